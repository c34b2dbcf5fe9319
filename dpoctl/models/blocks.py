"""The transformer blocks of a model: the units of activation checkpointing and, with the embedding, of sharding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import InputError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, or of the models that it contains, by the class names that transformers lists for them.

    Where it lists a block and its parts (Mamba), the block alone.
    Raises InputError for an architecture without such a list.
    """
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
    if not found:
        raise InputError(
            f"{type(model).__name__}: transformers does not say which of its modules are blocks",
            hint="leave --activation-checkpointing and --parallel fsdp out",
        )
    parts = {module for block in found for module in block.modules() if module is not block}
    return [block for block in found if block not in parts]


def shards(model: PreTrainedModel) -> list[nn.Module]:
    """What FSDP gathers one by one: the blocks, and an embedding that is not tied, apart from the head.

    Raises InputError as `blocks` does.
    """
    embedding = model.get_input_embeddings()
    own = {id(p) for p in embedding.parameters()}
    uses = sum(id(p) in own for _, p in model.named_parameters(remove_duplicate=False))
    return [*blocks(model), *([embedding] if uses == len(own) else [])]


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The module lists that hold the blocks in sequence."""
    known = set(blocks(model))
    return [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(child in known for child in m)]


def recompute_activations(model: nn.Module) -> None:
    """Activation checkpointing: every block keeps its input and recomputes the rest in the backward pass.

    Passes without gradients are unaffected. No random state is restored, since every dropout is 0 (`pretrained`).
    """
    for block in blocks(model):
        block.forward = _Recomputed(block.forward)


class _Recomputed:
    """A block's forward under activation checkpointing."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
