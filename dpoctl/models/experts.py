"""The experts of a mixture computed in the autocast dtype, like every other matrix product.

`transformers` multiplies the stacked matrices of all experts by `grouped_mm`, which autocast does not know: it would
compute in float32 over float32 weights, in bfloat16 over bfloat16 ones.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward


class _Rounded:
    """An experts module whose matrices are read in another dtype; the cast is part of the graph."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) and value.ndim > 1 else value


def _grouped_mm(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        module = _Rounded(module, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(module, hidden_states, *args, **kwargs)


def register() -> None:
    """Let every model use this in place of transformers' function of the same name."""
    ExpertsInterface.register("grouped_mm", _grouped_mm)
