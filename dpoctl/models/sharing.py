"""Several models on one set of frozen weights: each has its own adapters, and the base is held once."""

import copy
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


def share_frozen(model: Any, holders: list[Any]) -> int:
    """Let a model hold those of its frozen trunk's weights that equal a holder's in place of its own, on its device.

    Equal means the name within the trunk, the shape, and every number in the holder's precision. Returns the bytes that
    are shared.
    """
    known: dict[str, list[nn.Parameter]] = {}
    for holder in holders:
        for name, weight in trunk_of(holder).named_parameters():
            if not weight.requires_grad:
                known.setdefault(_plain(name), []).append(weight)
    trunk, shared = trunk_of(model), 0
    for name, weight in list(trunk.named_parameters()):
        found = next((w for w in known.get(_plain(name), []) if _equal(weight, w)), None)
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


@torch.no_grad()
def _equal(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and torch.equal(mine.to(theirs.device, theirs.dtype), theirs)
