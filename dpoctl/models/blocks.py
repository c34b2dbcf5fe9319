"""The transformer blocks of a model: what is computed again going back, and what is sharded one by one."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, or of the models within it, by the class names that transformers gives for them.

    Raises InputError for an architecture that names none.
    """
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
    if not found:
        raise InputError(
            f"{type(model).__name__}: transformers does not say which of its modules are blocks",
            hint="leave --activation-checkpointing and --parallel fsdp out",
        )
    return found


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists that hold the blocks one behind the other."""
    known = set(blocks(model))
    return [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(child in known for child in m)]


def recompute_activations(model: nn.Module) -> None:
    """Let every block keep only its input, and compute the rest again in the backward pass. Forward-only work is as before.

    No random numbers are restored: every dropout is 0 (`load`).
    """
    for block in blocks(model):
        block.forward = _recomputed(block.forward)


def _recomputed(forward):
    def call(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call
