"""Whether a GPU can run the compiled attention of packed rows, tried before a run relies on it.

A kernel may not be built (no C compiler, no Triton), or need more shared memory than the card has: that depends on the
width of the heads, the precision and the pass, backward needing the most. So what a model calls attention with is run
on a small row, forward and, for training, backward, and compared with attention by masks. Neither needs the model.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import log
from ..runtime import devices
from . import packed

# Largest difference, relative to the largest number, that rounding explains.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SHORT_WINDOW = 100  # in place of a longer one: the tried texts are longer, and a kernel takes windows of any length
_NO_COMPILER = ("c compiler", "invalidcxxcompiler", "c++ compiler")


def tried(call: packed.Call, longest: int, dtype: torch.dtype | None) -> packed.Call:
    """What is tried for a call with texts of up to `longest` tokens, under autocast in `dtype` (None: without)."""
    window = call.window if call.window is not None and call.window < longest else None
    return replace(call, window=window and min(window, _SHORT_WINDOW), dtype=dtype or call.dtype)


@cache
def fault_of(call: packed.Call, device: torch.device, learns: bool) -> str | None:
    """Why a call's kernel cannot be used on a device, as a reason in a message; None where it can.

    With `learns` its backward pass is tried too. Tried once for each call of a process.
    """
    name = str(call.dtype).removeprefix("torch.")
    kernel = f"the attention kernel for heads of width {call.width} in {name}" + (" with gradients" if learns else "")
    try:
        return None if _is_right(call, device, learns) else f"{kernel} gives other numbers than attention by masks"
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # torch, Inductor and Triton raise exceptions without a common class
        log.detail(f"{kernel}: {type(e).__name__}: {e}")
        said = f"{type(e).__name__}: {e}".lower()
        if any(each in said for each in _NO_COMPILER):
            return "Triton found no C compiler to build the attention kernel with: load a gcc module, or set CC"
        return f"{kernel} cannot be built or does not fit on {devices.device_name(device)} ({_first_line(e)})"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(": ") if text else type(error).__name__


def _is_right(call: packed.Call, device: torch.device, learns: bool) -> bool:
    """Whether the kernel's outputs, and with `learns` its gradients, are those of attention by masks in float32."""
    tree = _tree(call, device)
    draw = torch.Generator().manual_seed(0)
    shapes = ((call.heads, call.width), (call.key_heads, call.width), (call.key_heads, call.value_width))
    # heads come last in memory, as in a model: another layout would be compiled anew
    states = [torch.randn(1, len(tree.group), *shape, generator=draw) for shape in shapes]
    with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(learns):
        tried = _run(packed.attend_by_blocks, states, call, tree, device, call.dtype)
        # rounded to the call's precision, then exact
        rounded = [x.to(call.dtype) for x in states]
        wanted = _run(packed.attend_by_masks, rounded, call, tree, device, torch.float32)
    limit = TOLERANCE[call.dtype]
    return all(bool((a.float() - b).abs().max() <= limit * b.abs().max()) for a, b in zip(tried, wanted, strict=True))


def _tree(call: packed.Call, device: torch.device) -> packed.Tree:
    """Two branches of a prompt and a text alone, over a number of blocks that is not one of the call's sizes.

    The compiler takes sizes that are equal for the same size, and that of the heads for a constant, so that for as many
    blocks as heads it would compile a variant for rows of one length.
    """
    blocks = next(n for n in (3, 5, 7) if n not in (call.heads, call.key_heads))
    tail = 60 * blocks - 60
    texts = [([1] * (90 + tail - b) + [b], 90) for b in (0, 1)] + [([2] * 30, 1)]
    return packed.pack(texts, 1 << 20, device, whole=True)[1]


def _run(
    attend: Any, states: list[Tensor], call: packed.Call, tree: packed.Tree, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """[output], and with gradients those of query, key and value for a random gradient of the real tokens."""
    learns = torch.is_grad_enabled()
    leaves = [x.to(device, dtype).requires_grad_(learns) for x in states]
    query, key, value = (x.transpose(1, 2) for x in leaves)
    real = len(tree.group) - tree.filler
    out = attend(query, key, value, tree, call.window, call.scale)[:, :real]
    if not learns:
        return [out]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]
