"""FlexAttention on the fake device: its numbers by a dense mask, and the memory that its kernels hold."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import _disable_current_modes

from .tensors import CudaTensor, FakeGPU


def install() -> None:
    """Let `torch.compile` return its argument, and FlexAttention and SDPA on the device run here.

    Import dpoctl afterwards.
    """
    torch.compile = lambda function=None, **options: function or (lambda f: f)
    flex.flex_attention = flex_attention
    own = F.scaled_dot_product_attention

    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kw: Any) -> Any:
        if isinstance(query, CudaTensor) and not args and not kw.get("dropout_p"):
            mask = attn_mask if attn_mask is None else _inner(attn_mask)
            kw.pop("dropout_p", None)
            return _Attention.apply(*_cast(query, key, value), mask, kw)
        return own(query, key, value, attn_mask, *args, **kw)

    F.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = sdpa


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    **_: Any,
) -> Tensor:
    """What the kernel gives for a mask. Raises as torch's checks do: devices, and dtypes (torch 2.9 and 2.10)."""
    assert score_mod is None and block_mask is not None and not return_lse
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "Expected query, key, and value to have the same dtype, "
            f"but got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    where = {t.device for t in (query, key, value, block_mask.kv_num_blocks)}
    if len(where) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but got {where}")
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return _Attention.apply(*_cast(query, key, value), _dense(block_mask, query.shape[2], key.shape[2]), options)


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not torch.is_autocast_enabled("cuda"):
        return tensors
    dtype = torch.get_autocast_dtype("cuda")
    return tuple(t.to(dtype) for t in tensors)


def _dense(block_mask: Any, rows: int, columns: int) -> Tensor | None:
    """[rows, columns] of a block mask, made once, in no memory of the device."""
    assert FakeGPU.current
    if FakeGPU.current.backing.type == "meta":
        return None
    if not hasattr(block_mask, "_dense"):
        memory = FakeGPU.current.memory
        with memory.uncounted():
            block_mask._dense = _inner(flex.create_mask(block_mask.mask_mod, 1, 1, rows, columns, "cuda"))
    return block_mask._dense


def _inner(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, CudaTensor), "a mask on the CPU for queries on the device"
    return tensor.inner


class _Attention(torch.autograd.Function):
    """Attention that keeps queries, keys, values and output for the backward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        out = _computed((q, k, v), mask, options, None)[0]
        ctx.save_for_backward(q, k, v, out)
        ctx.mask, ctx.options = mask, options
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, _ = ctx.saved_tensors
        return (*_computed((q, k, v), ctx.mask, ctx.options, gradient), None, None)


def _computed(
    tensors: tuple[Tensor, ...], mask: Tensor | None, options: dict[str, Any], gradient: Tensor | None
) -> tuple[Tensor, ...]:
    """(output,), or the gradients of the tensors where the output's is given; computed apart from the device."""
    device = FakeGPU.current
    assert device
    with _disable_current_modes(), torch.enable_grad():
        q, k, v = (t.inner.detach().requires_grad_(gradient is not None) for t in tensors)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            out = _SDPA(q, k, v, mask, **options)
        found = (out,) if gradient is None else torch.autograd.grad(out, (q, k, v), gradient.inner.to(out.dtype))
    return tuple(device.put(t.detach()) for t in found)


_SDPA = torch._C._nn.scaled_dot_product_attention
