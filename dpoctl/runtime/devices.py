"""The machine a command runs on: device, precision, ranks, allocator, peak memory."""

import ctypes
import os
import platform
import re
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from .. import log
from ..errors import InputError
from . import collectives

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The torch device of `--device`. Raises InputError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and os.environ.get("LOCAL_RANK"):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(
            f"--device {name}: {str(e).splitlines()[0]}", hint="--device auto takes what is there"
        ) from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself, by its flags; elsewhere it is done in pieces, and slowly."""
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(flags) and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[0].split())


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "bfloat16" and device.type == "cpu" and not native_bfloat16():
        log.warn("--dtype bfloat16: this processor has no bfloat16 of its own, so float32 is the faster one here")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return _DTYPES[name]


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype):
    """Forward passes in `dtype` over float32 weights."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: by default it returns them to the system at every step and faults them in again."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's top is not given back


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the device: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_bytes(device: torch.device) -> int:
    """What the process holds now beside the run's own tensors, where peak_memory_bytes counts it: interpreter, libraries."""
    return peak_memory_bytes(device) if device.type == "cpu" else 0


def highest_memory_bytes(device: torch.device) -> int:
    """The peak memory of the rank that has the highest."""
    return max(collectives.gather(peak_memory_bytes(device)))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
