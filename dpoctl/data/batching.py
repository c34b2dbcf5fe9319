"""Which rows share an update, and which share a forward pass: pure functions of (seed, epoch) and lengths."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order [n] of an epoch, a pure function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


class Stream:
    """Items in batches of exactly `batch_size`, one epoch running into the next; the last batch may be smaller.

    `order(epoch)` gives the epoch's items, all `n` of them once.
    """

    def __init__(
        self, n: int, batch_size: int, epochs: float, max_steps: int | None, order: Callable[[int], np.ndarray]
    ):
        self.n, self.batch_size = n, batch_size
        self.total = max(1, math.ceil(n * epochs - 1e-9))
        self.steps = math.ceil(self.total / batch_size)
        if max_steps is not None and max_steps < self.steps:
            self.steps, self.total = max_steps, max_steps * batch_size
        self._order = lru_cache(maxsize=2)(order)

    def batch(self, step: int) -> list[int]:
        """Items of update `step` (0-based)."""
        where = range(step * self.batch_size, min((step + 1) * self.batch_size, self.total))
        return [int(self._order(i // self.n)[i % self.n]) for i in where]

    def epoch(self, step: int) -> float:
        """Epochs behind us after `step` updates."""
        return min(step * self.batch_size, self.total) / self.n


def shuffled(seed: int, n: int) -> Callable[[int], np.ndarray]:
    return lambda epoch: permutation(seed, epoch, n)


def shuffled_groups(seed: int, group_of: Sequence[int]) -> Callable[[int], np.ndarray]:
    """Groups in random order, the items of a group side by side in the order they came."""
    group = np.asarray(group_of)
    n_groups = int(group.max()) + 1

    def order(epoch: int) -> np.ndarray:
        rank = np.empty(n_groups, dtype=np.int64)
        rank[permutation(seed, epoch, n_groups)] = np.arange(n_groups)
        return np.argsort(rank[group], kind="stable")

    return order


def share(units: Sequence[T], cost: Callable[[T], int], rank: int, world: int) -> list:
    """This rank's units of a global batch, dealt out by falling cost so that ranks carry much the same."""
    return sorted(units, key=cost, reverse=True)[rank::world]


def pack(units: Sequence[T], size: Callable[[T], int], width: Callable[[T], int], tokens: int) -> list[list]:
    """Units in micro-batches of at most `tokens` tokens, wide ones first; a unit is never split.

    `size(unit)`: its tokens; `width(unit)`: its longest sequence, so that units that must be padded are alike.
    """
    batches: list[list] = []
    held = 0
    for unit in sorted(units, key=width, reverse=True):
        if not batches or held + size(unit) > tokens:
            batches.append([])
            held = 0
        batches[-1].append(unit)
        held += size(unit)
    return batches
