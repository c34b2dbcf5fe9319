"""The optimizers of training: the 8-bit one resumes to the same bytes; the log says how well the device is used."""

import sys
from types import SimpleNamespace

import pytest
import torch

from dpoctl.config.commands import COMMANDS
from dpoctl.config.resolve import resolve
from dpoctl.errors import InputError
from dpoctl.training.optimization import make_optimizer
from helpers.chain import TRAIN

DPO = [*"train-dpo --model sft --data prefs.jsonl --batch-size 16 --lr 1e-4".split(), *TRAIN, "--save-every", "2"]


@pytest.mark.slow
def test_the_8_bit_optimizer_resumes_to_the_same_bytes(prefs):
    pytest.importorskip("bitsandbytes")
    args = [*DPO, *"--optimizer adamw-8bit --max-steps 6".split()]
    prefs.run(*args, "--out", "uncut-8bit")
    prefs.kill(*args, "--out", "shot-8bit", when=lambda: prefs.has_checkpoint("shot-8bit"))
    _, err = prefs.run(*args, "--out", "shot-8bit")
    assert "resuming after update" in err
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (prefs.folder / "shot-8bit" / name).read_bytes() == (prefs.folder / "uncut-8bit" / name).read_bytes()
    prefs.run(*DPO, *"--optimizer adamw --max-steps 6 --out full-adamw".split())
    eight, full = (prefs.rows(f"{run}/metrics.jsonl")[-1]["loss"] for run in ("uncut-8bit", "full-adamw"))
    assert eight == pytest.approx(full, abs=0.002) and abs(eight - 0.693147) > 1e-4


def test_the_8_bit_optimizer_needs_its_package_and_whole_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    options = SimpleNamespace(optimizer="adamw-8bit", lr=1e-3, weight_decay=0.0)
    with pytest.raises(InputError, match="bitsandbytes is not installed"):
        make_optimizer(options, torch.nn.Linear(4, 4))
    flags = {"model": "m", "data": "d", "out": "o", "optimizer": "adamw-8bit", "parallel": "fsdp"}
    with pytest.raises(InputError, match="adamw-8bit cannot be sharded"):
        resolve(COMMANDS["train-dpo"], "train-dpo", flags, None)


def test_the_share_of_the_devices_peak_is_logged(trained):
    rows = trained.rows("dpo/timing.jsonl")
    assert rows and all(0 < row["mfu"] < 2 and row["tokens_per_s"] > 0 for row in rows)
