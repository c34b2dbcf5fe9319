"""Devices: more processes on a node than it has GPUs, a device without float64, and the peak memory of a process."""

import subprocess
import sys

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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a process is its own")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    """Linux hands the peak of a large process on to a command that it starts: as `ru_maxrss`."""
    told = "import torch; from dpoctl.runtime import devices as d; print(d.peak_memory_bytes(torch.device('cpu')))"

    def peak(text: str) -> int:
        return int(subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout)

    alone = peak(told)
    hold = f"import subprocess, sys; held = b'x' * {3 * alone}"
    started = peak(f"{hold}; subprocess.run([sys.executable, '-c', {told!r}], check=True)")
    assert started == pytest.approx(alone, rel=0.1)
