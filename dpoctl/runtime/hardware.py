"""The GPUs that people use: their memory, and the dense matrix products that they do in a second.

Peaks are the manufacturers' for dense products on tensor cores with float32 accumulation, float32 without TF32. Of
the memory, the nominal GB are counted on: a card has a few percent more, which its driver and the allocator take.
Nothing here imports torch before it is asked for a measurement.
"""

import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_MEASURED_WIDTH = {"cpu": 1024}  # of the product that is timed; other devices get a larger one
_MEASURED_SECONDS = {"cpu": 0.05}  # other devices: a third of a second


@dataclass(frozen=True)
class Hardware:
    """A kind of device: `memory` in bytes, `peaks` in FLOP/s by the name of the dtype; `gpu`: it computes like one."""

    name: str
    memory: int | None
    peaks: dict[str, float]
    gpu: bool = True

    @property
    def bfloat16(self) -> bool:
        """Whether it multiplies bfloat16."""
        return "bfloat16" in self.peaks


def _gpu(name: str, gigabytes: float, bfloat16: float, float32: float) -> Hardware:
    peaks = {"float32": float32 * 1e12} | ({"bfloat16": bfloat16 * 1e12} if bfloat16 else {})
    return Hardware(name, int(gigabytes * 1e9), peaks)


# name, GB, TFLOP/s of bfloat16 (0: none) and of float32
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 180, 2250, 75),
        _gpu("gh200", 96, 989, 67),
        _gpu("h200", 141, 989, 67),
        _gpu("h100", 80, 989, 67),
        _gpu("h100-pcie", 80, 756, 51),
        _gpu("h100-nvl", 94, 835, 60),
        _gpu("a100-80gb", 80, 312, 19.5),
        _gpu("a100-40gb", 40, 312, 19.5),
        _gpu("a40", 48, 149.7, 37.4),
        _gpu("l40s", 48, 362, 91.6),
        _gpu("l40", 48, 181, 90.5),
        _gpu("l4", 24, 121, 30.3),
        _gpu("a10", 24, 125, 31.2),
        _gpu("a6000", 48, 154.8, 38.7),
        _gpu("5090", 32, 209.5, 104.8),
        _gpu("4090", 24, 165.2, 82.6),
        _gpu("3090", 24, 71, 35.6),
        _gpu("v100", 32, 0, 15.7),
        _gpu("t4", 16, 0, 8.1),
    )
}
# parts of the names that CUDA gives: the first line whose parts are all in the name
_CUDA_NAMES = (
    (("b200",), "b200"),
    (("gh200",), "gh200"),
    (("h200",), "h200"),
    (("h100", "pcie"), "h100-pcie"),
    (("h100", "nvl"), "h100-nvl"),
    (("h100",), "h100"),
    (("a100", "80gb"), "a100-80gb"),
    (("a100",), "a100-40gb"),
    (("a40",), "a40"),
    (("l40s",), "l40s"),
    (("l40",), "l40"),
    (("l4",), "l4"),
    (("a10",), "a10"),
    (("rtx", "a6000"), "a6000"),
    (("5090",), "5090"),
    (("4090",), "4090"),
    (("3090",), "3090"),
    (("v100",), "v100"),
    (("t4",), "t4"),
)


def named(text: str) -> Hardware | None:
    """The device of --plan-device: one of GPUS, or a GPU with a number of GB that has bfloat16. None: neither."""
    name = text.strip().lower()
    if name in GPUS:
        return GPUS[name]
    try:
        gigabytes = float(name.removesuffix("gb"))
    except ValueError:
        return None
    if not 0 < gigabytes < 1e6:
        return None
    return Hardware(f"GPU of {gigabytes:g} GB", int(gigabytes * 1e9), {"float32": 0.0, "bfloat16": 0.0})


def of_cuda_name(name: str) -> Hardware | None:
    """The device whose name CUDA gives, such as "NVIDIA H100 80GB HBM3"; None where it is not in the table."""
    words = name.lower().replace("-", " ").split()
    for parts, known in _CUDA_NAMES:
        if all(part in words for part in parts):
            return GPUS[known]
    return None


def of_device(device: Any) -> Hardware:
    """What a torch device of this machine is; its memory is what torch, or the system, says."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = of_cuda_name(name)
        peaks = known.peaks if known else {"float32": 0.0}
        if torch.cuda.is_bf16_supported() and "bfloat16" not in peaks:
            peaks = peaks | {"bfloat16": 0.0}
        return Hardware(name, torch.cuda.get_device_properties(device).total_memory, peaks)
    memory = _main_memory() if device.type == "cpu" else None
    return Hardware(device.type, memory, {}, gpu=device.type != "cpu")


def _main_memory() -> int | None:
    """Bytes of main memory that this process may use: the machine's, or the limit of its control group."""
    found = []
    try:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError, AttributeError):  # another system, or "max": no limit
        pass
    return min(found, default=None)


@lru_cache(maxsize=8)
def peak_flops(device: Any, dtype: Any) -> float:
    """FLOP/s that the device can do in matrix products of a dtype: from the table, else by timing one for a moment."""
    known = of_device(device).peaks.get(str(dtype).removeprefix("torch."), 0.0)
    return known or measured_flops(device, dtype)


def measured_flops(device: Any, dtype: Any) -> float:
    """The highest rate of a square matrix product in FLOP/s, measured for a moment."""
    import torch

    width = _MEASURED_WIDTH.get(device.type, 8192)
    left, right = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    out, best, end = torch.empty_like(left), float("inf"), time.monotonic() + _MEASURED_SECONDS.get(device.type, 0.3)
    while time.monotonic() < end:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * width**3 / best
