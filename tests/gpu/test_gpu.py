"""What has to be seen on a real GPU (`make test-gpu`). `make test` tries the same code on a CPU with tiny sizes."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from gpu import commands, measures, models

# Largest differences from the CPU in float32: rounding of the products, which a wrong mask exceeds by far.
MOST_OFF = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 1e-1)}


def cases(names: Iterable[str], *tried: str, rest: bool = False) -> Any:
    """A test on `cuda` for all names, and on `cpu` for those that try its code; with `rest` the others are slow."""
    on_cpu = [pytest.param("cpu", n, marks=[] if n in tried else pytest.mark.slow) for n in (names if rest else tried)]
    on_cuda = [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in names]
    return pytest.mark.parametrize("place, name", on_cpu + on_cuda, indirect=["place"])


def small(place: torch.device) -> bool:
    return place.type == "cpu"


@cases(models.SMALL, "gpt2", "gemma3, two windows", rest=True)
def test_numbers(place, figures, name):
    row = measures.numbers(name, place, tokens=150 if small(place) else 900)
    figures(place, **row)
    assert row["packs"]
    for kind, (logps, gradients) in MOST_OFF.items():
        for way in ("packed", "padded"):
            assert row[f"{way} {kind}: log-probs off"] < logps
            assert row[f"{way} {kind}: gradients off"] < gradients
            assert row[f"{way} {kind}: not compiled"] == 0
    # A uniform number next to the border of two tokens may fall on either side.
    assert row["samples alike"] >= 0.75


@cases(["gemma3, two windows"], "gemma3, two windows")
def test_a_wrong_window_is_found(place, name):
    """The bounds of `test_numbers` find a window that is one token too short."""
    right = measures.build(name)
    config = copy.deepcopy(right.config)
    config.sliding_window -= 1
    wrong = type(right)(config).eval()
    wrong.load_state_dict(right.state_dict())
    seqs = measures.sequences(200)
    expected, _ = measures.step(right, seqs, torch.float32)
    found, _ = measures.step(wrong.to(place), seqs, torch.float32)
    assert ((found - expected).abs() / expected.abs()).max() > MOST_OFF["float32"][0]


@cases(["llama"], "llama")
def test_equal_steps(place, figures, name):
    row = measures.determinism(name, place, *((60, 2) if small(place) else (3000, 5)))
    figures(place, **row)
    assert row["deterministic: log-probs equal"] and row["deterministic: gradients equal"]


@cases(["llama", "gemma3, two windows"], "gemma3, two windows")
def test_recompiles(place, figures, name):
    row = measures.recompiles(name, place, shapes=2 if small(place) else 30)
    figures(place, **row)
    assert row["graphs of further shapes"] == 0 and row["not compiled"] == 0


@cases(["gpt2", "llama"], "gpt2")
def test_sharded(place, figures, name):
    row = measures.sharded(name, place, tokens=200 if small(place) else 900)
    figures(place, **row)
    # bfloat16 residual streams between sharded blocks, float32 ones in the whole model
    assert row["log-probs off"] < MOST_OFF["bfloat16"][0] and row["gradients off"] < MOST_OFF["bfloat16"][1]


TRAINED = {
    "gpt2-large": ("--tokens-per-batch", "16384"),
    "1b": ("--tokens-per-batch", "8192"),
    "8b": ("--tokens-per-batch", "4096", "--lora", "16", "--activation-checkpointing"),
    "8b, 4bit": ("--tokens-per-batch", "4096", "--lora", "16", "--activation-checkpointing", "--quantize", "4bit"),
}
UPDATES = "--batch-size 32 --max-steps 12 --log-every 4 --lr 1e-6 --warmup-steps 2 --max-length 512".split()


@cases(TRAINED, "gpt2-large")
def test_train_dpo(place, figures, world, tmp_path, name):
    """Rate and peak of train-dpo, the peak within 15 % of the plan."""
    shown, options = (
        ("tiny", "--batch-size 4 --max-steps 2 --warmup-steps 0 --tokens-per-batch 512 --dtype bfloat16".split())
        if small(place)
        else (name.split(",")[0], [*UPDATES, *TRAINED[name]])
    )
    for option, package in (("--lora", "peft"), ("--quantize", "bitsandbytes")):
        if option in options:
            pytest.importorskip(package)
    commands.prepare(tmp_path, shown, world.folder / "lm", *((8, 20) if small(place) else (512, 110)))
    row = commands.train(tmp_path, shown, place, *options)
    figures(place, model=shown, options=" ".join(options), **row)
    assert row["tokens_per_s"] > 0 and row["planned_gb"] > 0
    if not small(place):
        assert row["planned_gb"] == pytest.approx(row["peak_gb"], rel=0.15)


@cases(["gpt2-large", "1b", "8b"], "1b")
def test_sample(place, figures, world, tmp_path, name):
    shown, rows, tokens = ("tiny", 4, 6) if small(place) else (name, 256, 128)
    commands.prepare(tmp_path, shown, world.folder / "lm", 2 * rows, 20)
    row = commands.sample(tmp_path, shown, place, rows, tokens)
    figures(place, model=shown, rows=rows, **row)
    assert row["tokens_per_s"] > 0


@cases(["gpt2-large"], rest=True)  # on a CPU tests/test_ranks.py has it
def test_ranks(place, figures, world, tmp_path, name):
    """train-dpo --parallel fsdp on all cards gives the losses of one process."""
    ranks = 2 if small(place) else torch.cuda.device_count()
    if ranks < 2:
        pytest.skip("one CUDA device: test_sharded shards on it")
    shown = "tiny" if small(place) else name
    commands.prepare(tmp_path, shown, world.folder / "lm", *((8, 20) if small(place) else (128, 110)))
    row = commands.ranks(tmp_path, shown, place, ranks)
    figures(place, model=shown, ranks=ranks, **row)
    assert row["losses off"] < 1e-3


@cases(["gpt2-large"], "gpt2-large")
def test_trl(place, figures, world, tmp_path, name):
    """TRL beside train-dpo, where it is installed."""
    pytest.importorskip("trl")
    shown = "tiny" if small(place) else name
    commands.prepare(tmp_path, shown, world.folder / "lm", *((8, 20) if small(place) else (256, 110)))
    row = commands.trl(tmp_path, shown, place, *((4, 2) if small(place) else (32, 8)))
    figures(place, model=shown, **row)
    assert row["loss"] == pytest.approx(math.log(2), abs=0.02)  # of the first batch, in bfloat16
