"""What some losses read of the other pairs: statistics of the global batch, from a pass without gradient.

They are the same for every division of the batch into micro-batches and ranks, up to rounding.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.gaps import size
from ..objectives.catalogue import Traits
from ..objectives.pair_logps import PairLogps, Ranks, ranks_of
from ..runtime import collectives
from ..runtime.devices import to_device
from .comparison import Compared, Dataset

_TINY = 1e-30  # in place of a sum of weights that is 0
RUNNING = "running_mean"  # in a task's state: the sum of c and r of all pairs so far, and twice their number


@dataclass(frozen=True)
class Statistics:
    """Of a batch: its pairs' `weight` in all, the chosen completions' mean number of tokens, and what a loss needs.

    `batch_mean` and `running_mean` [] are those of c and r; `ranks` [N] are in the order of `rows`.
    """

    weight: float
    mean_tokens: float
    batch_mean: Tensor | None = None
    running_mean: Tensor | None = None
    ranks: Ranks | None = None
    rows: tuple[int, ...] = ()

    def added_to(self, p: PairLogps, rows: list[int]) -> PairLogps:
        """A micro-batch's log-probs with the statistics of their batch."""
        means = replace(p, batch_mean=self.batch_mean, running_mean=self.running_mean, mean_tokens=self.mean_tokens)
        if self.ranks is None:
            return means
        kept = to_device(torch.tensor(places(rows, list(self.rows))), self.ranks.margin.device)
        return replace(means, ranks=Ranks(*(values[kept] for values in vars(self.ranks).values())))

    def with_running_mean(self, running: tuple[float, float]) -> "Statistics":
        """With the mean that `running`, the sum and number of all c and r so far, gives."""
        assert self.batch_mean is not None
        return replace(self, running_mean=torch.full_like(self.batch_mean, running[0] / max(running[1], _TINY)))


def needs_pass(traits: Traits) -> bool:
    """Whether a loss reads statistics that take a pass of the whole batch before its update."""
    return traits.needs_batch_mean or traits.needs_running_mean or traits.needs_ranks


def of_batch(  # what a batch is made of
    traits: Traits,
    compared: list[tuple[list[int], Compared]],
    rows: list[int],
    data: Dataset,
    device: torch.device,
    *,
    late: bool = False,
) -> Statistics:
    """The statistics that a loss needs of a batch of pairs, `rows`, of which this rank `compared` some.

    `late`: the sum over this rank is divided, rather than each micro-batch's. The two differ by rounding.
    """
    weights, pairs = data.targets.weights, data.pairs
    of_rows = torch.ones(len(rows)) if weights is None else weights[rows]
    lengths = torch.tensor([float(size(data.sequences[pairs.pairs[i][0]])) for i in rows])
    total = max(float(of_rows.sum()), _TINY)
    found = Statistics(total, float((of_rows * lengths).sum() / total) or 1.0)
    if traits.needs_ranks:
        found = replace(found, ranks=_ranks_in(compared, rows, device), rows=tuple(rows))
    if traits.needs_batch_mean or traits.needs_running_mean:
        each = [_sum_of(c.logps, None if weights is None else to_device(weights[mine], device)) for mine, c in compared]
        mean = torch.zeros((), device=device)
        for value in each:
            mean += value if late else value / (2 * total)
        found = replace(found, batch_mean=collectives.sum_over_ranks(mean / (2 * total) if late else mean))
    return found


def running(state: dict[str, Any], batch_mean: Tensor | None = None, weight: float = 0.0) -> tuple[float, float]:
    """(sum, number) of c and r over all updates so far and, where its mean is given, a batch of this weight."""
    total, number = state.get(RUNNING, (0.0, 0.0))
    if batch_mean is None:
        return total, number
    return total + float(batch_mean) * 2 * weight, number + 2 * weight


def places(rows: list[int], batch: list[int]) -> list[int]:
    """Where in the batch each of some rows is; the n-th time that a row comes it is the n-th of the batch.

    A batch that spans two epochs may hold a pair twice: both are in the same micro-batch, as all pairs of a prompt are.
    """
    at: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(batch):
        at[row].append(place)
    seen: Counter[int] = Counter()
    found = []
    for row in rows:
        found.append(at[row][seen[row]])
        seen[row] += 1
    return found


def _sum_of(p: PairLogps, weights: Tensor | None) -> Tensor:
    return p.c.sum() + p.r.sum() if weights is None else (weights * (p.c + p.r)).sum()


def _ranks_in(compared: list[tuple[list[int], Compared]], batch: list[int], device: torch.device) -> Ranks:
    every = torch.zeros(4, len(batch), device=device)
    for rows, (p, _) in compared:
        at = to_device(torch.tensor(places(rows, batch)), device)
        every[:, at] = torch.stack([p.chosen, p.rejected, p.ref_chosen, p.ref_rejected])
    return ranks_of(*collectives.sum_over_ranks(every))
