"""Every command on a real GPU (`make test-gpu`), on the miniature world; `make test-slow` runs the same on a CPU."""

import signal
import time

import pytest

from gpu.test_gpu import cases, small
from helpers.chain import COLD, REWARD_MODEL, TRAIN, World, dpo, lines_in, ppo, wait_until

SAMPLED = "--max-new-tokens 12 --generation-batch-size 16"
ILQL = "train-ilql --model sft --data samples.jsonl --batch-size 16 --lr 1e-3 --save-every 2 --target-rate 0.1"
COMMANDS = {
    "sft": ["sft --model lm --data sft.jsonl --eval-data held.jsonl --lr 1e-3", *TRAIN],
    "sample": [f"sample --model sft --prompts test.jsonl {SAMPLED}"],
    "score": ["score --scorer rm --data samples.jsonl"],
    "make-prefs": [f"make-prefs --model sft --prompts train.jsonl --scorer classifier {SAMPLED}"],
    "train-dpo": dpo("")[:-1],
    "train-dpo, kto": [*dpo("")[:-1], "--loss kto"],
    "train-dpo, adapters": [*dpo("")[:-1], "--lora 4"],
    "train-dpo, recomputed": [*dpo("")[:-1], "--activation-checkpointing"],
    "train-rm": REWARD_MODEL,
    "train-ppo": ppo("")[:-1],
    "train-ppo, adapters": [*ppo("")[:-1], "--lora 4"],
    "train-ilql": [f"{ILQL} --eval-data samples.jsonl", *TRAIN],
    "evaluate": [f"evaluate --model dpo --model ppo --ref sft --prompts test.jsonl --scorer classifier {SAMPLED}"],
    "evaluate, values": [
        f"evaluate --model ilql --ilql-beta 0,4 --ref sft --prompts test.jsonl --scorer classifier {SAMPLED}"
    ],
    "judge": ["judge scored-a.jsonl scored-b.jsonl --backend scorer --scorer classifier"],
}
ROWS = {"sample", "score", "make-prefs", "evaluate", "evaluate, values", "judge"}
# what differs between equal runs are times and the machine's
FILES = {True: ("{out}",), False: ("{out}/model.safetensors", "{out}/metrics.jsonl")}
VALUES = ("{out}/ilql.safetensors", *FILES[False])
ADAPTERS = ("{out}/adapter_model.safetensors", "{out}/metrics.jsonl")


@pytest.fixture(scope="module")
def chain(optimised, trained) -> World:
    """The whole chain's files, made on a CPU; commands start as a user's do, since forks cannot share a GPU."""
    optimised.run("sample --model sft --prompts test.jsonl --max-new-tokens 12 --out scored-a.jsonl")
    optimised.run("sample --model dpo --prompts test.jsonl --max-new-tokens 12 --out scored-b.jsonl")
    optimised.run(ILQL, *TRAIN, "--out ilql")
    return World(optimised.folder, COLD)


def written(world: World, name: str, out: str) -> list[str]:
    files = ADAPTERS if "adapters" in name else VALUES if "ilql" in name else FILES[name in ROWS]
    return world.digest(*(file.format(out=out) for file in files))


@cases(COMMANDS, rest=True)
def test_a_command_twice(place, figures, chain, name):
    """Each command ends, and with --deterministic it writes the same bytes again."""
    deterministic = [] if small(place) else ["--deterministic"]
    found, seconds = [], []
    for kind in ("one", "two"):
        out = f"{name.replace(', ', '-')}-{kind}{'.jsonl' if name in ROWS else ''}"
        start = time.perf_counter()
        chain.run(*COMMANDS[name], *own_cache(name, kind), *deterministic, f"--device {place.type} --out {out}")
        seconds.append(round(time.perf_counter() - start, 1))
        found.append(written(chain, name, out))
    figures(place, seconds=seconds, equal=found[0] == found[1])
    assert found[0] == found[1]


def own_cache(name: str, kind: str) -> list[str]:
    """Reference log-probs are computed by each run."""
    return [f"--cache-dir cache-{name.replace(', ', '-')}-{kind}"] if "dpo" in name else []


@cases(["train-dpo"], rest=True)
def test_a_stopped_run_continues(place, figures, chain, name):
    """A run that is stopped and resumed writes the bytes of one that was not."""
    options = [*COMMANDS[name], f"--device {place.type}", *([] if small(place) else ["--deterministic"])]
    chain.run(*options, "--out whole")
    process = chain.popen(*options, "--out parts")
    wait_until(lambda: lines_in(chain.folder / "parts" / "metrics.jsonl") > 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75  # and not done
    chain.run(*options, "--out parts")
    equal = written(chain, name, "parts") == written(chain, name, "whole")
    figures(place, equal=equal)
    assert equal
