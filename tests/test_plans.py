"""What --dry-run says: phases of each command, the device that is planned for, and what would make it fit."""

import json
import re
import shutil

import pytest

from dpoctl.cli.app import run
from dpoctl.config.dpo import TrainDPO
from dpoctl.inference import evaluation_planning, fitting
from dpoctl.inference.memory import Phase
from dpoctl.models.tokenizers import load_codec
from helpers import real_models
from test_make_prefs import plan

HELD = ("weights", "gradients", "optimizer", "scorer")
SCORE = "score --data prefs.jsonl --columns completion=chosen --scorer rm"
ROWS = [{"prompt": real_models.text(200, i), "chosen": " w5 w6", "rejected": " w7"} for i in range(64)]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with small models of 2 layers and rows of them."""
    monkeypatch.chdir(tmp_path)
    for name, kind in (("lm", "policy"), ("rm", "reward")):
        real_models.write(tmp_path / name, "smollm2-135m", kind)
        config = json.loads((tmp_path / name / "config.json").read_text()) | {
            "num_hidden_layers": 2,
            "vocab_size": 2000,
        }
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    text = "".join(json.dumps(row | {"prompt_id": str(i)}) + "\n" for i, row in enumerate(ROWS))
    (tmp_path / "prefs.jsonl").write_text(text)
    return tmp_path


def shown(capsys, *args: str) -> dict[str, str]:
    assert run([*" ".join(args).split(), "--out", "x.jsonl" if "train" not in args[0] else "x", "--dry-run", "-q"]) == 0
    lines = [re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {words[0]: words[1] for words in lines if len(words) == 2}


def gigabytes(told: str) -> float:
    number, unit, *_ = told.split()
    return float(number) / (1 if unit == "GB" else 1000)


@pytest.mark.parametrize(
    ("command", "phases"),
    [
        ("train-dpo --model lm --data prefs.jsonl", ["reference", "updates"]),
        ("train-dpo --model lm --data prefs.jsonl --loss simpo", []),
        (
            "train-dpo --model lm --data prefs.jsonl --eval-prompts prefs.jsonl --scorer rm",
            ["reference", "updates", "evaluation"],
        ),
        (
            "train-ppo --model lm --prompts prefs.jsonl --reward rm --eval-prompts prefs.jsonl --scorer rm",
            ["roll-outs", "scoring", "log-probs", "learning", "evaluation"],
        ),
        ("train-rm --model lm --data prefs.jsonl", []),
        ("sft --model lm --data prefs.jsonl --field chosen", []),
        ("make-prefs --model lm --prompts prefs.jsonl --scorer rm", ["sampling", "scoring"]),
        ("sample --model lm --prompts prefs.jsonl", []),
        (SCORE, []),
        ("evaluate --model lm --ref lm --prompts prefs.jsonl --scorer rm", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_command_that_runs_a_model_tells_its_memory(small, capsys, command, phases):
    told = shown(capsys, command, "--plan-device", "4090")
    assert [name.removeprefix("memory in ") for name in told if name.startswith("memory in ")] == phases
    parts = [gigabytes(value) for name, value in told.items() if name.startswith("memory: ")]
    total = gigabytes(told["memory of a device"])
    assert sum(parts) == pytest.approx(total, abs=0.02) and 0.01 < total < 20
    if phases:
        assert max(gigabytes(told[f"memory in {name}"]) for name in phases) == total
    assert told["device"] == "4090, 24.00 GB: it fits"


@pytest.mark.slow
def test_an_engine_takes_its_share_of_a_gpu_and_needs_no_vllm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real_models.write(tmp_path / "big", "llama-8b")
    real_models.write(tmp_path / "rm", "smollm2-135m", "reward")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt_id": "a", "prompt": real_models.text(20)}) + "\n")
    line = "make-prefs --model big --prompts p.jsonl --scorer rm --engine"
    told = shown(capsys, f"{line} vllm --gpu-memory-utilization 0.5 --max-model-len 4096 --plan-device h100")
    assert gigabytes(told["memory in generation"]) == pytest.approx(40, abs=0.01)
    weights = gigabytes(told["memory: weights"])
    assert weights == pytest.approx(2 * 8.03, rel=0.1)  # bfloat16
    assert gigabytes(told["memory: vLLM's cache"]) == pytest.approx(40 - weights, abs=0.02)
    assert told["device"].endswith("it fits") and "memory: key cache" not in told
    told = shown(capsys, f"{line} vllm --max-model-len 4096 --plan-device 16")
    assert told["device"].endswith("too small") and told["what would fit"].startswith("--tensor-parallel-size 2 (")
    # one text of the whole context: 2 x 32 layers x 8 heads x 128 numbers of 2 bytes a token
    told = shown(capsys, f"{line} vllm --gpu-memory-utilization 0.25 --plan-device h100")
    assert gigabytes(told["memory: vLLM's cache"]) == pytest.approx(131072 * 2 * 32 * 8 * 128 * 2 / 1e9, rel=0.01)
    served = shown(capsys, f"{line} server --base-url http://node:8000/v1 --plan-device h100")
    assert served["engine"] == "server http://node:8000/v1" and gigabytes(served["memory of a device"]) < 8
    told = shown(capsys, "sample --model big --prompts p.jsonl --engine server --base-url http://node:8000/v1")
    assert "memory of a device" not in told and told["completions"] == "1"
    both = "evaluate --model big --ref big --prompts p.jsonl --scorer rm --plan-device h100 --engine"
    told = shown(capsys, f"{both} vllm --max-model-len 4096")
    assert gigabytes(told["memory in generation"]) == pytest.approx(72, abs=0.01)
    assert 30 < gigabytes(told["memory in evaluation"]) < 72
    served = shown(capsys, f"{both} server --base-url http://node:8000/v1")
    assert gigabytes(served["memory of a device"]) == pytest.approx(gigabytes(told["memory in evaluation"]), abs=0.1)


@pytest.mark.parametrize(
    ("command", "world"),
    [
        ("train-dpo --model lm --data prefs.jsonl --parallel fsdp --eval-prompts prefs.jsonl --scorer rm", "4"),
        ("evaluate --model lm --ref lm --prompts prefs.jsonl --scorer rm", None),
    ],
    ids=["train-dpo", "evaluate"],
)
def test_under_torchrun_one_rank_plans_for_all(small, capsys, monkeypatch, command, world):
    """Without the others: they have joined no process group."""
    alone = shown(capsys, command, "--plan-device 4090", *([f"--plan-world-size {world}"] if world else []))
    for rank, expected in (("0", alone), ("1", {})):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert shown(capsys, command, "--plan-device 4090") == expected


@pytest.mark.parametrize(
    ("line", "memory"),
    [
        ("score --data prefs.jsonl --columns completion=chosen --scorer", "memory: scorer"),
        pytest.param("train-ppo --model lm --prompts prefs.jsonl --reward", "memory: reward", marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_several_scorers_is_that_of_all(small, capsys, line, memory):
    shutil.copytree(small / "rm", small / "rm2")
    scorers = ("rm", "min:rm,rm2", "mean:rm,implicit:lm,lm")
    one, two, three = (gigabytes(shown(capsys, line, found, "--plan-device 24")[memory]) for found in scorers)
    assert two == pytest.approx(2 * one, rel=0.05) and three == pytest.approx(3 * one, rel=0.1)


def test_the_judge_tells_the_memory_of_its_scorer(small, capsys):
    rows = [{"prompt_id": str(i), "prompt": "w3", "completion": " w4", "reference": " w5", "k": 0} for i in range(4)]
    (small / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = shown(capsys, "judge samples.jsonl --backend scorer --scorer rm --plan-device 4090")
    assert told["judgements"] == "8" and "memory: scorer" in told


def test_a_device_decides_on_precision(small, capsys):
    """bfloat16 where --dtype is auto and the device has it: half the weights of a model that is not trained."""
    new, old = (shown(capsys, "sample --model lm --prompts prefs.jsonl --plan-device", d) for d in ("l4", "t4"))
    asked = shown(capsys, "sample --model lm --prompts prefs.jsonl --dtype float32 --plan-device l4")
    assert gigabytes(new["memory: weights"]) < gigabytes(old["memory: weights"])
    assert asked["memory: weights"] == old["memory: weights"]


@pytest.mark.parametrize(
    ("command", "share", "suggested"),
    [
        pytest.param(
            *("train-dpo --model lm --data prefs.jsonl --max-length 512", 0.5, r"--tokens-per-batch \d+ \("),
            marks=pytest.mark.slow,
        ),
        ("sample --model lm --prompts prefs.jsonl --max-new-tokens 400", 0.5, r"--generation-batch-size \d+ \("),
        pytest.param(
            *("train-dpo --model lm --data prefs.jsonl", -0.2, r"--parallel fsdp .*on \d+ devices \("),
            marks=pytest.mark.slow,
        ),
        ("sample --model lm --prompts prefs.jsonl", -0.2, "no change of these options"),
        (f"{SCORE} --scorer-tokens-per-batch 8000", 0.5, r"--scorer-tokens-per-batch \d+ \("),
        pytest.param(
            *("make-prefs --model lm --prompts prefs.jsonl --scorer rm", 0.5, r"--scorer-tokens-per-batch \d+ \("),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tokens", "generation", "devices", "nothing", "scores", "samples and scores"],
)
def test_what_does_not_fit_is_told_with_what_would(small, capsys, command, share, suggested):
    """On a device whose memory lies between what is held and what is needed, or (share < 0) below what is held."""
    told = shown(capsys, command, "--plan-device 24")
    total = gigabytes(told["memory of a device"])
    held = sum(gigabytes(told.get(f"memory: {part}", "0 GB")) for part in HELD)
    device = f"--plan-device {held + share * (total - held if share > 0 else held):.4f}"
    told = shown(capsys, command, device)
    assert told["device"].endswith("too small"), told
    assert re.search(suggested, told["what would fit"]), told
    found = re.match(r"((?:--\S+-batch(?:-size)? \d+ )+)\(([\d.]+ [GM]B)", told["what would fit"])
    assert bool(found) == (share > 0)
    if found:
        again = shown(capsys, command, device, found[1])
        assert again["device"].endswith("it fits") and again["memory of a device"].startswith(found[2])


@pytest.mark.parametrize(
    "command",
    [SCORE, "evaluate --model lm --ref lm --prompts prefs.jsonl --scorer rm --n 8"],
    ids=["score", "evaluate"],
)
def test_a_scorers_batches_decide_on_its_memory(small, capsys, command):
    told = {n: shown(capsys, command, f"--plan-device 24 --scorer-tokens-per-batch {n}") for n in (8000, 32000)}
    less, more = (gigabytes(told[n]["memory: temporary"]) for n in (8000, 32000))
    assert less < 0.6 * more and told[8000]["memory: scorer"] == told[32000]["memory: scorer"]


def test_an_unknown_device_is_refused(small, capsys):
    args = "train-dpo --model lm --data prefs.jsonl --out x --dry-run --plan-device h1000"
    assert run(args.split()) == 2
    assert "--plan-device h1000: expected a number of GB, or one of" in capsys.readouterr().err


def test_a_plan_on_this_machine_counts_the_process(prefs):
    told = plan(prefs, "sample --model sft --prompts train.jsonl --out planned.jsonl --device cpu")
    assert gigabytes(told["memory: process"]) > 0.1 and told["device"].startswith("cpu, ")


@pytest.mark.parametrize("lora", [None, 4])
def test_what_would_fit_is_not_refused(lora):
    """Nothing is quantised with --parallel fsdp."""

    def phases(config: TrainDPO) -> list[Phase]:
        return [Phase("updates", {"weights": 1 if config.quantize else 100})]

    for parallel, quantized in (("ddp", True), ("fsdp", False)):
        config = TrainDPO(model="lm", data=("prefs.jsonl",), out="x", dry_run=True, lora=lora, parallel=parallel)
        told = list(fitting.suggestions(config, phases, phases(config), 50))
        assert [" --quantize 4bit" in f" {words}" for words in told] == [True] * quantized, told


def test_the_plan_of_an_evaluation_runs_a_tokenizer_s_code_where_asked(small, capsys, monkeypatch):
    asked = []

    def open_codec(*args, trust_remote_code=False, **options):
        asked.append(trust_remote_code)
        return load_codec(*args, **options)

    monkeypatch.setattr(evaluation_planning, "load_codec", open_codec)
    shown(capsys, "evaluate --model lm --ref lm --prompts prefs.jsonl --scorer rm --trust-remote-code --plan-device 24")
    assert asked == [True]
