"""Work that the ranks of a process group share: items dealt out round-robin, results that every rank gets.

All functions are called on every rank with the same arguments. One process alone has all items.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeVar

from torch import nn

from ..errors import DpoctlError, Interrupted
from . import collectives, signals
from .fsdp_root import is_sharded
from .long_work import long_work

_IN_STEP = "_dpoctl_in_step"
T = TypeVar("T")


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This rank's items."""
    return items[collectives.rank() :: collectives.world_size()]


def in_order(dealt_items: list[list]) -> list:
    """Items that were dealt out, in their order again: [[a, c], [b]] is [a, b, c]."""
    return [
        item for one_of_each in zip_longest(*dealt_items, fillvalue=None) for item in one_of_each if item is not None
    ]


def map_shared(items: Sequence[T], function: Callable[[Sequence[T]], list]) -> list:
    """The results for all items, in their order; `function` gives a list with one for each of this rank's items.

    An error of any rank is raised on every rank; the others would wait for its results.
    """
    if collectives.world_size() == 1:
        return function(items)
    found, error = [], None
    try:
        found = function(dealt(items))
    except DpoctlError as e:
        error = e
    raise_on_every_rank(error)
    return in_order(collectives.gather(found))


def on_rank_0(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank, however long it takes. Its error is raised on every rank."""
    found, error = None, None
    with long_work():
        if collectives.rank() == 0:
            try:
                found = compute()
            except DpoctlError as e:
                error = e
    raise_on_every_rank(error)
    return collectives.from_rank_0(found)


def raise_on_every_rank(error: DpoctlError | None) -> None:
    """Raise an error that a rank has met on every rank: a rank's own, else that of the first rank that has one."""
    errors = collectives.gather(error and (type(error), error.message, error.hint))
    if error:
        raise error
    if other := next(filter(None, errors), None):
        kind, message, hint = other
        raise kind(message, hint)


def in_rounds(model: nn.Module, items: Sequence[T], dummy: Callable[[], Any]) -> Iterator[T | None]:
    """This rank's items, one each round; None in a last round in which other ranks alone have one.

    `dummy` is called then if the model is sharded: ranks gather its weights together.
    """
    for start in range(0, len(items), collectives.world_size()):
        at = start + collectives.rank()
        if at < len(items):
            yield items[at]
        else:
            if is_sharded(model):
                dummy()
            yield None


def stop_together(done: str) -> None:
    """Raise Interrupted on every rank where a signal has arrived on any; `done` says what is complete and kept."""
    if collectives.world_size() == 1:
        signals.at_boundary(done)
    elif collectives.any_rank(bool(signals.stop.signal)):
        raise stopped(done)


def stopped(done: str) -> Interrupted:
    """The exception of a rank that stops with the others, of which one at least has had a signal."""
    by = signals.stop.signal or "a signal to another rank"
    return Interrupted(f"stopped by {by} after {done}", hint="rerun the command to resume")


# --- forward passes whose number differs between ranks ---------------------------------------------------------------


@contextmanager
def in_step(model: nn.Module, dummy: Callable[[], Any]) -> Iterator[None]:
    """Inside, ranks may forward a sharded model any number of times, each pass called by `forward_in_step`.

    At its end a rank runs `dummy()` until no other rank has a pass left. An error inside is raised after that.
    """
    if not is_sharded(model):
        yield
        return
    model.__dict__[_IN_STEP] = True
    try:
        error = None
        try:
            yield
        except DpoctlError as e:
            error = e
        while collectives.any_rank(False):
            dummy()
    finally:
        del model.__dict__[_IN_STEP]
    if error:
        raise error


def forward_in_step(model: nn.Module, forward: Callable[[], T]) -> T:
    """The result of one forward pass of a model, which a rank without one accompanies (see `in_step`)."""
    if _IN_STEP in model.__dict__:
        collectives.any_rank(True)
    return forward()
