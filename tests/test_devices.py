"""Devices: more processes on a node than it has GPUs, and a device without float64."""

import pytest
import torch

from dpoctl.errors import InputError
from dpoctl.runtime import devices


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused_by_their_numbers(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in (("LOCAL_RANK", "6"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="^8 processes on this node, 4 GPUs\\n") as refused:
        devices.pick_device(asked)
    assert "--nproc-per-node 4" in refused.value.hint


def test_mps_is_refused_and_not_picked(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="--device mps: sums are taken in float64"):
        devices.pick_device("mps")
