"""The bytes that a command holds on the fake device at its peak, beside what its `--dry-run` says."""

import json
import re

import pytest

from fake_gpu import hollow

TRAIN = (
    "--max-length 512 --max-prompt-length 128 --tokens-per-batch 1500 --lr 1e-4 --warmup-steps 2 --batch-size 4 "
    "--epochs 1"
)
COMMANDS = {
    "dpo": f"train-dpo {TRAIN}",
    "checkpointing": f"train-dpo {TRAIN} --activation-checkpointing",
    "adapters": f"train-dpo {TRAIN} --lora 16",
    "reward model": f"train-rm {TRAIN}",
    "ilql": f"train-ilql {TRAIN} --rows preferences",
}
TOLERANCE = 0.15  # how far the plan may be off the ledger, as a share of the ledger
UPDATES = 5  # 20 pairs
UNITS = {"GB": 1e9, "MB": 1e6}


@pytest.fixture(scope="module")
def long_pairs(inputs):
    """Pairs of prompts of 60 words with answers of 120, and models without numbers."""
    from transformers import AutoTokenizer

    words = " ".join(row["text"] for row in inputs.rows("sft.jsonl")).split(" ")
    rows = []
    for start in range(0, 20 * 60, 60):
        prompt, chosen, rejected = (" ".join(words[start + a : start + b]) for a, b in ((0, 60), (60, 180), (90, 210)))
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    (inputs.folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(inputs.folder / "lm")
    for size in hollow.SIZES:
        hollow.write(inputs.folder / f"hollow-{size}", size, tokenizer)
    return inputs


@pytest.mark.parametrize("size", ["small", *(pytest.param(s, marks=pytest.mark.slow) for s in ("1b", "8b"))])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_plan_is_what_a_run_holds(card, long_pairs, command, size):
    """All updates that are planned: some have one micro-batch, some a second one beside the gradients of the first."""
    if command == "adapters":
        pytest.importorskip("peft")
    if size == "8b" and command in ("dpo", "checkpointing", "reward model", "ilql"):
        pytest.skip("all weights of 8b are not trained on one device")
    words = f"{COMMANDS[command]} --model hollow-{size} --data long.jsonl --out hollow --overwrite"
    report = card.run(words, cwd=long_pairs.folder, backing="meta", updates=UPDATES)
    assert not report.error and len(report.updates) == UPDATES, f"{report.error}\n{report.log}"
    planned = _planned(long_pairs, words)
    print(f"{command} {size}: ledger {report.peak / 1e9:.2f} GB, --dry-run {planned / 1e9:.2f} GB")
    assert planned == pytest.approx(report.peak, rel=TOLERANCE)


def _planned(world, words: str) -> float:
    """Bytes of a GPU by --dry-run."""
    text, _ = world.run(words, "--plan-device h100 --dry-run")
    [(number, unit)] = re.findall(r"(?m)^memory of a device +(\S+) (GB|MB) \(updates\)$", text)
    return float(number) * UNITS[unit]
