"""Which items share an update, and which a forward pass: pure functions of (seed, epoch) and lengths."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Order = Callable[[int], np.ndarray]  # epoch (from 0) -> the order [n] of its items


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """A random order [n] of n items, a pure function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


class Stream:
    """Items in batches of exactly `batch_size`; a batch may span two epochs, and the last one may be smaller.

    `order(epoch)` contains each of the `n` items once. `steps` batches hold `total` items.
    """

    def __init__(self, n: int, batch_size: int, epochs: float, max_steps: int | None, order: Order):
        self.n, self.batch_size = n, batch_size
        self.total = max(1, math.ceil(n * epochs - 1e-9))
        self.steps = math.ceil(self.total / batch_size)
        if max_steps is not None and max_steps < self.steps:
            self.steps, self.total = max_steps, max_steps * batch_size
        self._order = lru_cache(maxsize=2)(order)

    def batch(self, step: int) -> list[int]:
        """The items of update `step` (from 0)."""
        positions = range(step * self.batch_size, min((step + 1) * self.batch_size, self.total))
        return [int(self._order(i // self.n)[i % self.n]) for i in positions]

    def epoch(self, step: int) -> float:
        """Epochs completed after `step` updates."""
        return min(step * self.batch_size, self.total) / self.n


def shuffled(seed: int, n: int) -> Order:
    """n items in a new random order each epoch."""
    return partial(permutation, seed, n=n)


def shuffled_groups(seed: int, group_of: Sequence[int]) -> Order:
    """Groups in a new random order each epoch; the items of a group stay adjacent and in order."""
    return partial(_group_permutation, seed, np.asarray(group_of))


def _group_permutation(seed: int, group: np.ndarray, epoch: int) -> np.ndarray:
    n_groups = int(group.max()) + 1
    position = np.empty(n_groups, dtype=np.int64)
    position[permutation(seed, epoch, n_groups)] = np.arange(n_groups)
    return np.argsort(position[group], kind="stable")


def share(units: Sequence[T], cost: Callable[[T], int], rank: int, world: int) -> list[T]:
    """This rank's units of a global batch, dealt out by decreasing cost so that ranks have about equal cost."""
    return sorted(units, key=cost, reverse=True)[rank::world]


def pack(units: Sequence[T], size: Callable[[T], int], width: Callable[[T], int], tokens: int) -> list[list[T]]:
    """Units in micro-batches of at most `tokens` tokens, wide ones first; a unit is never split.

    `size(unit)`: its tokens; `width(unit)`: its longest sequence, so that units padded together have similar widths.
    """
    batches: list[list[T]] = []
    used = 0
    for unit in sorted(units, key=width, reverse=True):
        if not batches or used + size(unit) > tokens:
            batches.append([])
            used = 0
        batches[-1].append(unit)
        used += size(unit)
    return batches
