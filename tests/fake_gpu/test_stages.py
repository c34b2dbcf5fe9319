"""Every command that runs a model, on the fake CUDA device, to its end.

A tensor on the wrong device raises there. Each wait of the host for the device is counted: a kernel that the device
could start meanwhile starts late, once per update or once per token.
"""

from dataclasses import dataclass

import pytest

from fake_gpu.client import Report, reads, uploads

TRAIN = "--batch-size 6 --max-length 96 --max-prompt-length 16 --warmup-steps 2 --lr 1e-4 --max-steps 3 --log-every 1"
DPO = f"train-dpo --data pairs.jsonl {TRAIN}"
RATED = f"train-dpo --data rated.jsonl --model lm {TRAIN}"
PPO = (
    "train-ppo --model lm --prompts train.jsonl --reward fake-rm --batch-size 12 --minibatch-size 6 --ppo-epochs 2 "
    "--max-steps 2 --max-new-tokens 8 --max-length 96 --max-prompt-length 16 --log-every 1"
)
ONE_MICRO, MANY_MICROS = "--tokens-per-batch 8192", "--tokens-per-batch 60"
MANY = 6  # micro-batches of an update with MANY_MICROS: one for each row


@dataclass(frozen=True)
class Waits:
    """The most waits of an update of one micro-batch, and of each further one."""

    reads: int
    uploads: int
    further_reads: int
    further_uploads: int


# One wait for numbers, so that a loss that is not finite stops before the weights change; no copy to the device waits.
UPDATE = {
    name: Waits(1, 0, 0, 0) for name in ("sft", "train-dpo", "train-dpo kto", "train-rm", "train-ppo", "train-ilql")
}
UPDATE["train-dpo running"] = Waits(2, 0, 0, 0)  # and one for the running mean
STEP_READS, STEP_UPLOADS = 1, 0  # waits of a step of decoding: one for the tokens on the host

TRAINED = {
    "sft": ("sft", f"sft --model lm --data sft.jsonl {TRAIN}"),
    "gpt2": ("train-dpo", f"{DPO} --model lm"),
    "llama": ("train-dpo", f"{DPO} --model fake-llama"),
    "neox": ("train-dpo", f"{DPO} --model fake-neox"),
    "gemma3, two windows": ("train-dpo", f"{DPO} --model fake-gemma3"),
    "kto": ("train-dpo kto", f"{DPO} --model lm --loss kto"),
    "batch statistics": ("train-dpo running", f"{DPO} --model lm --loss aot,bco_pair,sft"),
    "moving": ("train-dpo", f"{DPO} --model lm --sync-ref-every 1 --ld-alpha 0.5 --wpo --use-weights"),
    "unpaired kto": ("train-dpo", f"{RATED} --loss kto --unpaired --use-weights"),
    "unpaired bco": ("train-dpo running", f"{RATED} --loss bco"),
    "adapters": ("train-dpo", f"{DPO} --model lm --lora 4"),
    "activation checkpointing": ("train-dpo", f"{DPO} --model lm --activation-checkpointing"),
    "reward model": ("train-rm", f"train-rm --model lm --data pairs.jsonl {TRAIN} --eval-every 3"),
    "ppo": ("train-ppo", PPO),
    "ilql": ("train-ilql", f"train-ilql --rows preferences --model lm --data pairs.jsonl {TRAIN}"),
}


@pytest.mark.parametrize("case", TRAINED)
def test_training(card, inputs, case):
    """The run ends, packs its batches, and waits for the device as often as allowed, however many micro-batches."""
    command, words = TRAINED[case]
    if case == "adapters":
        pytest.importorskip("peft")
    name, bound = f"on-card-{case.replace(', ', '-').replace(' ', '-')}", UPDATE[command]
    whole = _run(card, inputs, words, ONE_MICRO, f"--out {name}")
    # the second update: the first one may still compile or try things out, the last one saves
    _assert_at_most(whole.updates[1], bound.reads, bound.uploads)
    packed = ("sft", "gpt2", "kto", "batch statistics", "unpaired kto", "unpaired bco", "reward model", "ppo", "ilql")
    if case in packed:
        cut = _run(card, inputs, words, MANY_MICROS, f"--out {name}-cut", updates=2)
        further = MANY - 1
        most = bound.reads + bound.further_reads * further, bound.uploads + bound.further_uploads * further
        _assert_at_most(cut.updates[1], *most)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_a_stopped_run_goes_on(card, inputs, optimizer):
    """From the checkpoint of the first update: weights and optimizer's state are where its step needs them."""
    words = f"{DPO} --model lm --optimizer {optimizer} --save-every 1 --out on-card-resumed-{optimizer}"
    card.run(words, "--overwrite", cwd=inputs.folder, updates=2).assert_clean()
    report = card.run(words, cwd=inputs.folder)
    report.assert_clean()
    assert "resuming after update 1" in report.log


def test_ppo_on_the_base_of_a_reward_models_adapters(card, inputs):
    """Policy, value and reward model hold the base once; the value's own adapters are moved to it."""
    pytest.importorskip("peft")
    inputs.run(f"train-rm --model lm --data pairs.jsonl {TRAIN} --lora 4 --device cpu --out fake-rm-adapters")
    words = PPO.replace("--reward fake-rm", "--reward fake-rm-adapters --lora 4")
    report = _run(card, inputs, words, "--out on-card-one-base")
    assert "its adapters share the policy's base" in report.log


def test_numbers(card, inputs):
    """Training on the device, whose attention has block masks and padded rows, gives the CPU's numbers."""
    words = f"{DPO} --model fake-gemma3 --dtype float32"
    _run(card, inputs, words, "--out on-card")
    inputs.run(words, "--device cpu --out on-cpu")
    card_rows, cpu_rows = (inputs.rows(f"on-{where}/metrics.jsonl") for where in ("card", "cpu"))
    assert len(card_rows) == len(cpu_rows) == 3
    for one, other in zip(card_rows, cpu_rows, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_sampling(card, inputs):
    """The waits of a step of decoding: what a longer sample of the same prompts adds, by step."""
    found = {}
    for tokens in (20, 32):
        out = f"on-card-{tokens}.jsonl"
        report = _run(card, inputs, f"sample --model lm --prompts train.jsonl --max-new-tokens {tokens} --out {out}")
        found[tokens] = report, max(len(row["completion_ids"]) for row in inputs.rows(out))
    (short, few), (long, many) = found[20], found[32]
    assert many - few > 5
    assert reads(long.waits) - reads(short.waits) <= STEP_READS * (many - few), long.waits
    assert uploads(long.waits) - uploads(short.waits) <= STEP_UPLOADS * (many - few), long.waits


def test_other_commands(card, inputs):
    rows = "--prompts test.jsonl --scorer classifier --max-new-tokens 8"
    _run(card, inputs, f"make-prefs --model fake-llama {rows} --out fake-prefs.jsonl")
    _run(card, inputs, f"evaluate --model lm --ref lm --lm fake-neox {rows} --out fake-eval.jsonl")
    _run(card, inputs, "score --scorer fake-rm --data held.jsonl --out fake-scores.jsonl")
    assert inputs.rows("fake-eval.jsonl")[0]["kl"] == pytest.approx(0.0, abs=1e-6)


# --- the faults that these tests must find


@pytest.mark.parametrize(
    "fault, message",
    [
        ("targets on the CPU", "Expected all tensors to be on the same device"),
        ("keys in another dtype", "Expected query, key, and value to have the same dtype"),
    ],
)
def test_a_fault_raises(card, inputs, fault, message):
    words = f"{DPO} -v --model lm --out on-card-fault"
    report = card.run(words, "--overwrite", cwd=inputs.folder, faults=[fault], updates=1)
    assert message in report.error + report.log


def test_a_fault_waits(card, inputs):
    words = f"{DPO} --model lm {ONE_MICRO} --out on-card-fault"
    report = card.run(words, "--overwrite", cwd=inputs.folder, faults=["a wait in the loss"], updates=2)
    report.assert_clean()
    with pytest.raises(AssertionError, match="item"):
        _assert_at_most(report.updates[1], UPDATE["train-dpo"].reads, UPDATE["train-dpo"].uploads)


def _run(card, inputs, *words: str, updates: int = 0) -> Report:
    report = card.run(*words, "--overwrite", cwd=inputs.folder, updates=updates)
    report.assert_clean()
    assert "batches are padded" not in report.log, report.log
    return report


def _assert_at_most(waits: dict[str, int], most_reads: int, most_uploads: int) -> None:
    found = sorted(f"{n} x {place}" for place, n in waits.items())
    assert reads(waits) <= most_reads and uploads(waits) <= most_uploads, "\n".join(found)
