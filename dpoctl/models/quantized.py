"""Frozen weights in 4 or 8 bits (QLoRA, 2305.14314), by bitsandbytes, and checkpoints that are quantised already.

A quantised layer computes as an ordinary one whose weight is W_q, the dequantised weight: x W_q^T in the precision of
x, or of autocast. bitsandbytes' own products depend on whether a gradient is needed, on the CPU's instructions, and
(8 bits) on the other rows of the batch, so that a policy and its reference would differ before the first update.
"""

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import log
from ..errors import InputError

BITS = {"4bit": 4, "8bit": 8}
_LAYERS = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' classes, found by name: it is not imported without need
_INSTALL = "pip install 'dpoctl[lora,quantize]'"


# --- which models are quantised --------------------------------------------------------------------------------------


def method_of(folder: str | Path) -> str | None:
    """How the checkpoint in a directory is quantised (`bitsandbytes`, `gptq`, `fp8` ...) by its config.json."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
        return found and str(found.get("quant_method") or "bitsandbytes")
    except (OSError, ValueError, AttributeError):
        return None


def is_quantized(model: Any) -> bool:
    """Whether weights of a model are quantised."""
    return getattr(model, "hf_quantizer", None) is not None


def require_trainable(model: Any, path: str) -> None:
    """Raise InputError for a quantised model on which adapters cannot be trained."""
    if is_quantized(model) and not model.hf_quantizer.is_trainable:
        method = _method(model)
        raise InputError(
            f"--lora: {path} is quantised by {method}, through which transformers computes no gradients",
            hint="give the checkpoint in full precision that it was made from, with --quantize 4bit",
        )


def refuse_full_training(model: Any, path: str) -> None:
    """Raise InputError for a quantised model: its weights cannot be trained, only adapters on them."""
    if is_quantized(model):
        raise InputError(
            f"{path} is quantised ({_method(model)}): its weights cannot be trained",
            hint="--lora 16 trains adapters on it; or give the checkpoint in full precision that it was made from",
        )


def _method(model: Any) -> str:
    method = model.hf_quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


# --- quantising while loading ----------------------------------------------------------------------------------------


def loading_options(kind: str, path: str, device: str | torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to load linear layers as `4bit` (NF4, double quantisation) or `8bit`.

    Raises InputError where bitsandbytes is not installed or does not support the device.
    """
    _require_bitsandbytes(path, torch.device(device))
    from transformers import BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if kind == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def _require_bitsandbytes(path: str, device: torch.device) -> None:
    from transformers.utils import is_accelerate_available, is_bitsandbytes_available

    if not is_bitsandbytes_available() or not is_accelerate_available():
        name = "accelerate" if is_bitsandbytes_available() else "bitsandbytes"
        raise InputError(f"{path}: loading it quantised needs {name}", hint=_INSTALL)
    try:
        import bitsandbytes
    except Exception as e:  # it loads a native library
        raise InputError(f"bitsandbytes cannot be loaded: {type(e).__name__}: {str(e)[:200]}", hint=_INSTALL) from e
    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device.type not in supported:
        raise InputError(
            f"--quantize: bitsandbytes {bitsandbytes.__version__} does not support the device {device.type}",
            hint=f"--device {' or '.join(sorted(supported - {'npu', 'xpu', 'hpu'}))}; or leave --quantize out",
        )


def prepare(model: Any) -> None:
    """Let every layer of bitsandbytes compute as the module says; nothing where the model has none."""
    for module in model.modules():
        if type(module).__name__ in _LAYERS:
            module.forward = MethodType(_forward, module)


def describe(model: Any, kind: str) -> None:
    """Log how many of the weights are quantised: layers that are not linear, such as fused experts, are not."""
    bits = BITS[kind]
    inside = sum(_elements(m) for m in model.modules() if type(m).__name__ in _LAYERS)
    total = count(model)
    share = inside / max(1, total)
    log.say(f"{inside:,} of {total:,} weights are held in {bits} bits")
    if share < 0.5:
        log.warn(
            f"--quantize {kind} holds only {100 * share:.0f} % of the weights in {bits} bits: the others are "
            "embeddings, or not in linear layers (fused experts)"
        )


def count(model: Any) -> int:
    """Number of a model's weights; quantised ones are packed, several in a byte."""
    packed = {id(m.weight): _elements(m) for m in model.modules() if type(m).__name__ in (*_LAYERS, "PlannedLinear")}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def _elements(layer: Any) -> int:
    return layer.in_features * layer.out_features


# --- a quantised layer -----------------------------------------------------------------------------------------------


def _forward(layer: Any, x: Tensor) -> Tensor:
    """x W_q^T + b, [..., in] to [..., out], in the precision of autocast or else of x; differentiable in x."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Product.apply(x, layer)


class _Product(torch.autograd.Function):
    """The product with a weight that is dequantised in both passes, so that only its few bits are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, weight_of(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ weight_of(ctx.layer, gradient.dtype), None


def weight_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """The dequantised weight [out, in] of a layer of bitsandbytes."""
    weight = layer.weight
    if type(layer).__name__ == "Linear8bitLt":
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB  # the largest number of each row
        return (weight.data * (scale.float() / 127.0)[:, None]).to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    state.dtype = dtype  # of the result
    return dequantize_4bit(weight.data, state)


# --- plans -----------------------------------------------------------------------------------------------------------


class PlannedLinear(nn.Linear):
    """A linear layer that holds `bits` a weight and computes as a quantised one does, without numbers: for plans."""

    def __init__(self, like: Any, bits: int):
        with torch.device("meta"):
            super().__init__(*_shape(like), bias=like.bias is not None)
        size, blocks = self.weight.numel(), -(-self.weight.numel() // 64)
        scales = blocks + blocks // 64 if bits == 4 else 4 * self.out_features  # 4 bits: doubly quantised, bytes
        self.weight = nn.Parameter(
            torch.empty(size * bits // 8 + scales, dtype=torch.uint8, device=like.weight.device), requires_grad=False
        )
        if like.bias is not None:
            self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _PlannedProduct.apply(x, self.out_features)


class _PlannedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int) -> Tensor:
        ctx.width, ctx.inputs = width, x.shape[-1]
        return F.linear(x, x.new_empty(width, ctx.inputs))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.width, ctx.inputs), None


def plan(model: Any, kind: str) -> None:
    """Replace the linear layers that `loading_options` would quantise by `PlannedLinear`."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(model))
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear", "Conv1D") and name not in kept:
            model.set_submodule(name, PlannedLinear(module, BITS[kind]))


def _shape(linear: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, or of GPT-2's Conv1D."""
    if type(linear).__name__ == "Conv1D":
        return linear.weight.shape[0], linear.weight.shape[1]
    return linear.in_features, linear.out_features
