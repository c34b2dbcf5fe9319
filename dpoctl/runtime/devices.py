"""The machine that a command runs on: device, precision, allocator, peak memory."""

import ctypes
import os
import platform
import re
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import log
from ..errors import InputError
from . import collectives, determinism

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """The device that a command computes on, and the dtype of its forward passes over float32 weights."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self, *, cached: bool = True) -> AbstractContextManager:
        """The context of forward passes in `dtype`; `cached` keeps the cast copies of the weights until it ends."""
        return autocast(self.device, self.dtype, cached=cached)

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process on the device."""
        return peak_memory_bytes(self.device)

    @property
    def name(self) -> str:
        """The device as manifests name it."""
        return device_name(self.device)


def open_compute(device: str = "cpu", dtype: str = "float32") -> Compute:
    """The device of `--device` with the precision of `--dtype`. Raises InputError where the device is not available."""
    chosen = pick_device(device)
    return Compute(chosen, pick_dtype(dtype, chosen))


def pick_device(name: str) -> torch.device:
    """The torch device of `--device`. Raises InputError where it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "mps":
            raise RuntimeError("sums are taken in float64, which MPS does not have")
        if device.type == "cuda" and os.environ.get("LOCAL_RANK"):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            _check_gpus_of_node(device)
            torch.cuda.set_device(device)
        determinism.apply(device.type)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(
            f"--device {name}: {str(e).splitlines()[0]}", hint="--device auto picks an available device"
        ) from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _check_gpus_of_node(device: torch.device) -> None:
    """Raise InputError where torchrun started more processes on this node than it has GPUs."""
    gpus = torch.cuda.device_count()
    if device.index < gpus or not gpus:
        return
    started = int(os.environ.get("LOCAL_WORLD_SIZE") or device.index + 1)
    raise InputError(
        f"{started} processes on this node, {gpus} GPU{'s' if gpus > 1 else ''}",
        hint=f"torchrun --nproc-per-node {gpus}; CUDA_VISIBLE_DEVICES and the job's request decide which GPUs are seen",
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute precision of `--dtype` on a device; `auto` is bfloat16 on GPUs that support it, else float32."""
    if name == "bfloat16" and device.type == "cpu" and not native_bfloat16():
        log.warn("--dtype bfloat16: this processor emulates bfloat16; float32 is faster on it")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return _DTYPES[name]


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, by its flags."""
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(flags) and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[0].split())


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of `--save-dtype`."""
    return _DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype, *, cached: bool = True) -> AbstractContextManager:
    """Forward passes in `dtype` over float32 weights.

    `cached` keeps the cast copies of trained weights until the context ends: for weights that are used more than once.
    """
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=cached)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a GPU copies it from pinned memory, without waiting for the work that is queued."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks; by default it returns them to the system and page-faults them in at every step."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separately mapped blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the device: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (resident := _sizes("/proc/self/status").get("VmHWM")) is not None:
        return resident  # ru_maxrss may be the peak of the process that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sizes(path: str) -> dict[str, int]:
    """The sizes that a file of /proc tells, in bytes by name; empty where there is no such file."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {found: 1024 * int(kb) for found, kb in re.findall(r"^(\w+):\s*(\d+) kB", text, re.MULTILINE)}


def has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes can stay allocated beside the highest memory so far, with a tenth of the memory to spare.

    False where it is not known how much memory there is.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) + size <= 0.9 * total
    found = _sizes("/proc/meminfo")
    return found.get("MemAvailable", 0) - size >= 0.1 * found.get("MemTotal", 0) > 0  # freed memory is kept


def process_bytes(device: torch.device) -> int:
    """Memory of the process before a run's tensors, where peak_memory_bytes counts it: interpreter and libraries."""
    return peak_memory_bytes(device) if device.type == "cpu" else 0


def highest_memory_bytes(device: torch.device) -> int:
    """The highest peak memory of all ranks."""
    return max(collectives.gather(peak_memory_bytes(device)))


def device_name(device: torch.device) -> str:
    """The device as manifests name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
