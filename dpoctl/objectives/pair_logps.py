"""What a preference loss reads of its pairs; the notation is that of `preference`."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Of each pair [P], detached: what has the rank of its own quantity in the global batch.

    `margin`: log p_ref_w - log p_ref_l with the rank of log p_w - log p_l. `rejected`: the r with the rank of c.
    `chosen`: the c with the rank of r.
    """

    margin: Tensor
    rejected: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class PairLogps:
    """The inputs of a loss, [P] float32 where nothing else is said; the reference's are zeros where a loss needs none.

    Beside the log-probs: of the batch, `batch_mean` [], the mean of c and r over the global batch (KTO's z before its
    clamp), `running_mean` [], that over all updates so far, `mean_tokens`, the chosen completions' mean number of
    tokens, and `ranks`. Of the rows, `gap`: s_w - s_l of the scores, and `label`: the probability that w is better.
    `slope` gives f' of a log-ratio for another divergence than the reverse KL. `whole_chosen`: log p_w where `chosen`
    discounts its last tokens. What a loss does not read may be None.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    batch_mean: Tensor | None = None
    running_mean: Tensor | None = None
    mean_tokens: float | None = None
    ranks: Ranks | None = None
    gap: Tensor | None = None
    label: Tensor | None = None
    slope: Callable[[Tensor], Tensor] | None = None
    undiscounted: Tensor | None = None

    @property
    def c(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def r(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def d(self) -> Tensor:
        """D, of f' of the two ratios where another divergence is asked for."""
        return self.c - self.r if self.slope is None else self.slope(self.c) - self.slope(self.r)

    @property
    def mean_d(self) -> Tensor:
        """D from per-token means."""
        return self.c / self.chosen_tokens - self.r / self.rejected_tokens

    @property
    def whole_chosen(self) -> Tensor:
        """log p_w, each token counted."""
        return self.chosen if self.undiscounted is None else self.undiscounted

    @property
    def mean_chosen(self) -> Tensor:
        return self.whole_chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        return self.rejected / self.rejected_tokens

    def only(self, kept: Tensor) -> "PairLogps":
        """Some of the pairs: `kept` [P] bool, or indices. `ranks` are dropped: they are those of a whole batch."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        per_pair: dict[str, Any] = {k: v[kept] for k, v in found.items() if isinstance(v, Tensor) and v.dim() == 1}
        return replace(self, ranks=None, **per_pair)


def ranks_of(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Ranks:
    """The ranks of a global batch of N pairs, from all of its log-probs [N]; equal values rank by their places."""
    c, r = chosen - ref_chosen, rejected - ref_rejected
    return Ranks(_of_same_rank(chosen - rejected, ref_chosen - ref_rejected), _of_same_rank(c, r), _of_same_rank(r, c))


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [N] the one of `others` [N] that has its rank."""
    order = values.argsort(stable=True)
    found = torch.empty_like(others)
    found[order] = others.sort(stable=True).values
    return found
