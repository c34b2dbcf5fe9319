"""Where a model's weights may be read: FSDP gathers them for the time of a module's forward, and for no longer."""

from collections.abc import Callable
from typing import Any

from torch import nn

_ROOT = "_dpoctl_root"


class FsdpRoot(nn.Module):
    """The outermost module of a sharded model: its forward is whatever is done with the model's trunk and head together."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def with_gathered_weights(model: nn.Module, function: Callable[[], Any]) -> Any:
    """function(), which may read weights of `model` outside of its modules' own forwards, such as the head's."""
    root = model.__dict__.get(_ROOT)
    return function() if root is None else root(function)


def is_sharded(model: nn.Module) -> bool:
    return _ROOT in model.__dict__


def attach_root(model: nn.Module, root: FsdpRoot) -> None:
    """Say that `root` is the outermost module of `model` (no child of it: it holds the model)."""
    model.__dict__[_ROOT] = root
