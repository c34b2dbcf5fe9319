"""Several models on one set of frozen weights: each has its own adapters, and the base is held once."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .probes import trunk_of

_INSERTED = (".base_layer", "base_model.model.")  # what peft puts into the names of weights


def copy_sharing_frozen(module: nn.Module) -> Any:
    """A copy of a module that shares the frozen weights."""
    return copy.deepcopy(module, {id(shared): shared for shared in _frozen(module)})


def frozen_copy(model: nn.Module) -> Any:
    """A copy of a model with its adapters as they are now, none of which is trained; it shares the frozen weights."""
    return copy_sharing_frozen(model).requires_grad_(False)


def equal(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two weights have the same shape and, in the second one's precision, the same numbers."""
    return mine.shape == theirs.shape and torch.equal(mine.detach().to(theirs.device, theirs.dtype), theirs.detach())


def share_frozen(model: Any, holders: list[Any], same: Callable[[Tensor, Tensor], bool] = equal) -> int:
    """Let a model hold those of its frozen trunk's weights that a holder has too in place of its own, on its device.

    They are those of one name within the trunk that are the `same`. Returns the bytes that are shared.
    """
    known: dict[str, list[nn.Parameter]] = {}
    for holder in holders:
        for name, weight in trunk_of(holder).named_parameters():
            if not weight.requires_grad:
                known.setdefault(_plain(name), []).append(weight)
    trunk, shared = trunk_of(model), 0
    for name, weight in list(trunk.named_parameters()):
        found = next((w for w in known.get(_plain(name), []) if same(weight, w)), None)
        if found is None or weight.requires_grad or found is weight:
            continue
        owner, _, last = name.rpartition(".")
        layer = trunk.get_submodule(owner)
        layer._parameters[last] = found
        if (state := getattr(found, "quant_state", None)) is not None:
            layer.quant_state = state
        shared += found.numel() * found.element_size()
    return shared


def _frozen(module: nn.Module) -> list[Any]:
    """The frozen weights of a module, and what belongs to those that are quantised."""
    weights = [p for p in module.parameters() if not p.requires_grad]
    return weights + [state for p in weights if (state := getattr(p, "quant_state", None)) is not None]


def _plain(name: str) -> str:
    for part in _INSERTED:
        name = name.replace(part, "")
    return name
