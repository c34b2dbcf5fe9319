"""Pairs under policy and reference: what the losses of a micro-batch read, but for the statistics of the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.encode import PairData
from ..data.gaps import first_tokens, size
from ..models.logprobs import SHORTEST, Sequences, summed_logps
from ..models.routing import RoutedTokens
from ..objectives.divergence import DIVERGENCES
from ..objectives.pair_logps import PairLogps
from ..runtime.devices import to_device
from .forward import Forward, discounted, shared_lengths
from .moving_reference import MovingReference
from .pairs import PairBatch
from .targets import Targets

Prefixes = dict[tuple[int, int], int]


class ComparisonOptions(Protocol):
    """The options that change what a loss compares."""

    @property
    def ld_alpha(self) -> float | None: ...
    @property
    def wpo(self) -> bool: ...
    @property
    def f_divergence(self) -> str: ...
    @property
    def f_alpha(self) -> float: ...


@dataclass(frozen=True)
class Dataset:
    """Pairs, the sequences of their unique completions, and what else the loss reads of them.

    `ref_logps`: the reference's summed log-probs of the completions and, with --ld-alpha, of the first tokens of some,
    which are at `prefixes` by (completion, number of tokens); None where the reference moves. `mismatched`: of single
    completions, the same rows with their `PairData.mismatched` as completions.
    """

    pairs: PairData
    sequences: Sequences
    targets: Targets
    ref_logps: Tensor | None = None
    prefixes: Prefixes = field(default_factory=dict)
    mismatched: "Dataset | None" = None


class Compared(NamedTuple):
    """The log-probs of a micro-batch's pairs under policy and reference, and the pairs' weights [P], None for 1."""

    logps: PairLogps
    weights: Tensor | None


def only(rows: list[int], compared: Compared, members: list[int]) -> tuple[list[int], Compared]:
    """The pairs of a micro-batch, whose indices are `rows`, that are among `members`."""
    inside = set(members)
    mine = [row in inside for row in rows]
    kept, (logps, weights) = torch.tensor(mine, device=compared.logps.chosen.device), compared
    fewer = Compared(logps.only(kept), None if weights is None else weights[kept])
    return [row for row, m in zip(rows, mine, strict=True) if m], fewer


def prefixes_of(data: PairData, sequences: Sequences) -> tuple[Prefixes, list[tuple[Sequence[int], int]]]:
    """(where the log-prob of the first tokens of a completion is, the texts that end there), for --ld-alpha.

    The first tokens are as many as the shorter completion of a pair has. They come after all `sequences`.
    """
    at: Prefixes = {}
    for pair, length in zip(data.pairs, shared_lengths(sequences, data.pairs), strict=True):
        for i in pair:
            if length < size(sequences[i]):
                at.setdefault((i, length), len(sequences) + len(at))
    return at, [first_tokens(sequences[i], n) for i, n in at]


class Comparison:
    """Compares pairs under the policy `model` and its reference: one in memory, where it moves, or cached values."""

    def __init__(self, config: ComparisonOptions, model: Any, moving: MovingReference | None, device: torch.device):
        self.model, self.moving, self.device = model, moving, device
        self.ld_alpha = config.ld_alpha
        self.forward = Forward(config.ld_alpha, config.wpo)
        self.slope = None
        if config.f_divergence != "reverse-kl":
            self.slope = partial(DIVERGENCES[config.f_divergence], alpha=config.f_alpha)

    def compare(self, batch: PairBatch, dataset: Dataset, routed: RoutedTokens | None = None) -> Compared:
        """The log-probs of a micro-batch's pairs, differentiable in those of the policy, and the pairs' weights."""
        ref_chosen, ref_rejected = self._reference(batch, dataset)
        policy = self.forward.sides(self.model, dataset.sequences, batch, routed)
        lengths = [float(size(dataset.sequences[i])) for i in batch.completions]
        tokens = to_device(torch.tensor(lengths), self.device)
        w, l = to_device(batch.pairs, self.device).unbind(1)  # noqa: E741
        logps = PairLogps(policy.chosen, policy.rejected, ref_chosen, ref_rejected, tokens[w], tokens[l])
        gap, label, of_rows = (self._of_rows(values, batch) for values in vars(dataset.targets).values())
        whole = None if self.ld_alpha is None else policy.whole_chosen
        logps = replace(logps, gap=gap, label=label, slope=self.slope, undiscounted=whole)
        if policy.weights is None or of_rows is None:
            return Compared(logps, of_rows if policy.weights is None else policy.weights)
        return Compared(logps, policy.weights * of_rows)

    def dummy(self) -> Tensor:
        """What a rank forwards that has no micro-batch left: the same models in the same order."""
        if self.moving:
            with torch.no_grad():
                summed_logps(self.moving.model, SHORTEST)
        return summed_logps(self.model, SHORTEST).sum()

    def _of_rows(self, values: Tensor | None, batch: PairBatch) -> Tensor | None:
        return None if values is None else to_device(values[batch.rows], self.device)

    def _reference(self, batch: PairBatch, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """The reference's log-probs [P] of the chosen and of the rejected completions of a micro-batch."""
        if self.moving:
            with torch.no_grad():
                sides = Forward(self.ld_alpha).sides(self.moving.model, dataset.sequences, batch)
            return sides.chosen, sides.rejected
        assert dataset.ref_logps is not None
        reference = to_device(dataset.ref_logps[batch.completions], self.device)
        w, l = to_device(batch.pairs, self.device).unbind(1)  # noqa: E741
        if not dataset.prefixes or self.ld_alpha is None:
            return reference[w], reference[l]
        whole = [(batch.completions[i], batch.completions[j]) for i, j in batch.pairs.tolist()]
        lengths = shared_lengths(dataset.sequences, whole)
        at = [[dataset.prefixes.get((i, n), i) for i in pair] for pair, n in zip(whole, lengths, strict=True)]
        prefix = to_device(dataset.ref_logps[torch.tensor(at)], self.device)
        return (
            discounted(reference[w], prefix[:, 0], self.ld_alpha),
            discounted(reference[l], prefix[:, 1], self.ld_alpha),
        )
