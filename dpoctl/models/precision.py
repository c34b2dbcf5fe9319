"""Weights that are not trained, held in the precision of the matrix products that read them.

Autocast rounds a linear layer's float32 weights to the compute dtype at each use. Weights that never change can be
rounded once: the products are the same to the bit, and take half the memory and no conversion at each use. Embeddings,
norms, convolutions and the heads of classifiers stay float32, because what reads them computes in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_READ_BY_KERNELS = ("dt_proj",)  # Mamba's kernels read this layer's bias in float32
_EXPERTS = "Experts"  # in the class names of modules that stack the matrices of a layer's experts


class Float32Linear(nn.Linear):
    """A linear layer that computes in its weights' dtype under autocast.

    Scores rounded to bfloat16 would make ties of texts that differ.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def keep_head_in_float32(model: nn.Module, labels: int) -> None:
    """Let the last layer of a classifier with `labels` outputs compute in float32 under autocast; once is enough."""
    if any(isinstance(module, Float32Linear) for module in model.modules()):
        return
    heads = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m.out_features == labels]
    for name, head in heads[-1:]:
        kept = Float32Linear(head.in_features, labels, bias=head.bias is not None, device="meta")
        kept.weight, kept.bias = head.weight, head.bias
        model.set_submodule(name, kept.train(head.training))


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights that only matrix products read to `dtype`, in place.

    A frozen head that is tied to the embedding gets weights of its own, since the embedding stays as it is.
    """
    if dtype == torch.float32:
        return
    for path, module in model.named_modules():
        if ".lora_" in path:  # peft casts the input to the dtype of an adapter's matrices, also where they are read in
            continue  # another (`full_precision`)
        if path.endswith(_READ_BY_KERNELS):
            continue
        for name in _names_in_products(module):
            weight = module._parameters[name]
            if weight is not None and weight.dtype == torch.float32 and not weight.requires_grad:
                module._parameters[name] = nn.Parameter(weight.to(dtype), requires_grad=False)


def _names_in_products(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's parameters that only matrix products read."""
    forward: Any = type(module).forward
    if forward is nn.Linear.forward or forward is Conv1D.forward:
        return ("weight", "bias")
    if _EXPERTS in type(module).__name__:
        return tuple(name for name, weight in module._parameters.items() if weight is not None and weight.ndim > 1)
    return ()


@contextmanager
def full_precision(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Forward passes in float32: without autocast, and weights that are held in less are cast one layer at a time."""
    hooks = [hook for module in model.modules() if _is_held(module) for hook in _casting_hooks(module)]
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_held(module: nn.Module) -> bool:
    names = _names_in_products(module)
    return any((w := module._parameters[name]) is not None and w.dtype != torch.float32 for name in names)


def _casting_hooks(module: nn.Module) -> list[Any]:
    """Hooks that replace a module's held weights by float32 ones during its forward pass."""
    held = {name: module._parameters[name] for name in _names_in_products(module)}

    def cast(module: nn.Module, args: Any) -> None:
        for name, weight in held.items():
            if weight is not None and weight.dtype in (torch.bfloat16, torch.float16):
                module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(held)

    return [module.register_forward_pre_hook(cast), module.register_forward_hook(restore, always_call=True)]
