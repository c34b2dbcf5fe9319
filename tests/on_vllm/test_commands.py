"""Commands with --engine vllm: the chain, resumed after kills, and what is told of a model that vLLM cannot run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chain import World, lines_in, make_world, wait_until
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import byte_level_bpe

from .conftest import save_model

pytestmark = pytest.mark.vllm

ENGINE = "--engine vllm --engine-arg enforce_eager=true --gpu-memory-utilization 0.3"


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("chain")
    make_world(folder)
    world = World(folder, [sys.executable, "-m", "dpoctl"])
    world.env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return world


def run(world: World, line: str, code: int = 0) -> str:
    """What a command says on stderr."""
    done = subprocess.run(
        [*world.warm, *line.split()], cwd=world.folder, env=world.env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "INFO" not in done.stdout and "INFO" not in done.stderr  # vLLM writes to its log
    return done.stderr


def vllm_processes(folder: Path) -> list[str]:
    """Processes of vLLM that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "vllm" in (process / "cmdline").read_text().lower() and (process / "cwd").resolve() == folder:
                found.append(process.name)
        except OSError:
            continue
    return found


MAKE = f"make-prefs --model lm --prompts train.jsonl --scorer classifier --max-new-tokens 20 {ENGINE}"


def test_preferences_are_made_resumed_and_trained_on(chain):
    line = f"{MAKE} --engine-batch-size 16 --completions-out samples.jsonl --out prefs.jsonl"
    progress = chain.folder / "prefs.jsonl.samples.progress"
    process = chain.popen(line)
    wait_until(lambda: lines_in(progress) >= 2, process, seconds=600)
    kept = (chain.folder / "prefs.jsonl.samples.partial").read_bytes().splitlines()[:32]
    process.kill()
    process.communicate()
    wait_until(lambda: not vllm_processes(chain.folder.resolve()), seconds=30)
    process = chain.popen(line)  # stopped by a signal to the command alone
    wait_until(lambda: lines_in(progress) >= 4, process, seconds=600)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 75 or "75" in said, said
    assert not vllm_processes(chain.folder.resolve())
    assert "resuming after" in run(chain, line)
    samples = chain.rows("samples.jsonl")
    assert [(r["prompt_id"], r["k"]) for r in samples] == [
        (r["prompt_id"], k) for r in chain.rows("train.jsonl") for k in range(4)
    ]
    stored = [json.loads(text) for text in kept]
    assert [r["completion_ids"] for r in samples[: len(stored)]] == [r["completion_ids"] for r in stored]
    assert not list(chain.folder.glob("*.samples.*"))
    train = "train-dpo --model lm --data prefs.jsonl --batch-size 16 --lr 1e-3 --max-length 96 --max-prompt-length 16"
    assert "tokenised" not in run(chain, f"{train} --max-steps 6 --out dpo")
    evaluate = "evaluate --model dpo --ref lm --prompts test.jsonl --scorer classifier --n 16 --max-new-tokens 20"
    said = run(chain, f"{evaluate} {ENGINE} --out vllm.jsonl")
    difference = float(said.partition("differ from those of the KL by ")[2].split()[0])
    assert difference < 1e-4
    run(chain, f"{evaluate} --out here.jsonl")
    (one,), (other,) = chain.rows("vllm.jsonl"), chain.rows("here.jsonl")
    assert one["n"] == other["n"]
    for name in ("reward", "kl", "kl_exact", "length"):
        error = (one[f"{name}_se"] ** 2 + other[f"{name}_se"] ** 2) ** 0.5
        assert abs(one[name] - other[name]) < 4 * error, name


def test_what_vllm_cannot_run_is_told_in_a_sentence(chain):
    narrow = chain.folder / "narrow"
    tokenizer = byte_level_bpe()
    tiny_model("llama", vocab=len(tokenizer), eos_token_id=0, bos_token_id=0).save_pretrained(narrow)  # heads of 8
    tokenizer.save_pretrained(narrow)
    common = "sample --prompts train.jsonl --max-new-tokens 8 --engine vllm --out o.jsonl"
    said = run(chain, f"{common} --model narrow", code=2)
    assert "vLLM's log is" in said and "narrow: vLLM: " in said
    odd = save_model(chain.folder / "odd", "llama")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    assert "this vLLM lacks the architecture" in run(chain, f"{common} --model odd", code=2)
    assert "--engine-arg takes the arguments of vllm.LLM" in run(
        chain, f"{common} --model lm --engine-arg no_such=1", code=2
    )
    assert not (chain.folder / "o.jsonl.plan.json").exists()
