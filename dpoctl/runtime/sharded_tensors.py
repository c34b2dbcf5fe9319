"""Tensors of a checkpoint as safetensors: one file, or one per rank with its rows (dimension 0) of every tensor.

The files' rows follow each other, and a rank reads its rows from whichever files hold them, so a checkpoint that was
written at one world size is read at any other.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import collectives, fsdp


def write(folder: Path, kind: str, tensors: dict[str, Tensor], sharded: bool) -> Path:
    """Write this rank's rows of the tensors; returns the file."""
    of = f"-{collectives.rank() + 1:05d}-of-{collectives.world_size():05d}" if sharded else ""
    path = folder / f"{kind}{of}.safetensors"
    save_file({name: fsdp.local_part(t.detach()).contiguous() for name, t in tensors.items()}, path)
    return path


def kinds(folder: Path, kind: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape over all files' rows, dtype) of each tensor."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for path in _files(folder, kind):
        with safe_open(path, "pt") as f:
            for name in f.keys():
                rows = f.get_slice(name)
                first, *others = rows.get_shape()
                known = found[name][0][0] if name in found else 0
                found[name] = (known + first, *others), rows[:0].dtype
    return found


@torch.no_grad()
def read(folder: Path, kind: str, targets: dict[str, Tensor]) -> None:
    """Fill this rank's rows of the targets."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in _files(folder, kind)]
        for name, target in targets.items():
            first, end = fsdp.rows_of(target)
            at = 0
            for file in files:
                rows = file.get_slice(name)
                size = rows.get_shape()[0]
                low, high = max(first, at), min(end, at + size)
                if low < high:
                    fsdp.local_part(target)[low - first : high - first].copy_(rows[low - at : high - at])
                at += size


def _files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}.safetensors")) or sorted(folder.glob(f"{kind}-*.safetensors"))
