"""The outermost FSDP module of a model: its forward gathers the weights outside the blocks, such as the head's."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

_ROOT = "_dpoctl_root"
T = TypeVar("T")


class FsdpRoot(nn.Module):
    """Wraps a model so that its forward runs any function that reads the model's trunk and head together."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def with_gathered_weights(model: nn.Module, function: Callable[[], T]) -> T:
    """The result of `function()`, which may read weights outside the forward of the model's modules.

    Plain models need no gathering: the function is called as it is.
    """
    root = model.__dict__.get(_ROOT)
    return function() if root is None else root(function)


def is_sharded(model: nn.Module) -> bool:
    return _ROOT in model.__dict__


def attach_root(model: nn.Module, root: FsdpRoot) -> None:
    """Record the outermost module of `model`; not as a child, since it contains the model."""
    model.__dict__[_ROOT] = root
