"""The log-probs of a micro-batch's pairs under a model, whose completions are forwarded once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.gaps import size
from ..models.logprobs import Sequences, aligned_token_logps, response_token_logps, summed_logps
from ..models.routing import RoutedTokens
from ..runtime.devices import to_device
from .pairs import PairBatch


@dataclass(frozen=True)
class Forward:
    """How a model's log-probs are read.

    `ld_alpha`: the weight of the tokens beyond the length of a pair's shorter completion (2409.06411), None for plain
    sums. `aligned`: the weights of WPO are computed too.
    """

    ld_alpha: float | None = None
    aligned: bool = False

    def sides(self, model: Any, sequences: Sequences, batch: PairBatch, routed: RoutedTokens | None = None) -> "Sides":
        """The log-probs of a micro-batch's pairs, differentiable; `sequences` are those of all completions."""
        texts = [sequences[i] for i in batch.completions]
        if self.ld_alpha is None and not self.aligned:
            w, l = to_device(batch.pairs, _device(model)).unbind(1)  # noqa: E741
            sums = summed_logps(model, texts, routed=routed)
            chosen = sums[w]
            return Sides(chosen, sums[l], chosen)
        if self.aligned:
            logps, owner, alignments = aligned_token_logps(model, texts, routed)
        else:
            logps, owner = response_token_logps(model, texts, routed=routed)
        w, l = to_device(batch.pairs, logps.device).unbind(1)  # noqa: E741
        sums = _summed(logps, owner, len(texts))
        chosen, rejected, weights = sums[w], sums[l], None
        if self.ld_alpha is not None:
            prefixes = _prefix_sums(logps, texts, batch)
            chosen, rejected = (discounted(sums[side], prefixes[:, i], self.ld_alpha) for i, side in enumerate((w, l)))
        if self.aligned:
            lengths = to_device(torch.tensor([float(size(text)) for text in texts]), logps.device)
            of_text = (_summed(alignments, owner, len(texts)) / lengths).exp()
            weights = of_text[w] * of_text[l]
        return Sides(chosen, rejected, sums[w], weights)


@dataclass(frozen=True)
class Sides:
    """Log-probs [P] of the pairs' completions, of the chosen ones with each token counted, and the weights of WPO."""

    chosen: Tensor
    rejected: Tensor
    whole_chosen: Tensor
    weights: Tensor | None = None


def discounted(whole: Tensor, prefix: Tensor, alpha: float) -> Tensor:
    """The sum over the first tokens, `prefix`, plus alpha times that over the others, from the `whole` sum."""
    return prefix + alpha * (whole - prefix)


def shared_lengths(sequences: Sequences, pairs: list[tuple[int, int]]) -> list[int]:
    """The number of tokens of each pair's shorter completion."""
    return [min(size(sequences[i]) for i in pair) for pair in pairs]


def _prefix_sums(logps: Tensor, texts: Sequences, batch: PairBatch) -> Tensor:
    """[P, 2]: the sum over the first tokens of both completions of each pair, as many as the shorter one has."""
    first, at = [], 0
    for text in texts:
        first.append(at)
        at += size(text)
    pairs = [(i, j) for i, j in batch.pairs.tolist()]
    places: list[int] = []
    owner: list[int] = []
    for n, (pair, length) in enumerate(zip(pairs, shared_lengths(texts, pairs), strict=True)):
        for side, i in enumerate(pair):
            places += range(first[i], first[i] + length)
            owner += [2 * n + side] * length
    rows, owners = (to_device(torch.tensor(x), logps.device) for x in (places, owner))
    return _summed(logps.index_select(0, rows), owners, 2 * len(pairs)).view(-1, 2)


def _summed(values: Tensor, owner: Tensor, n: int) -> Tensor:
    return values.new_zeros(n).index_add(0, owner, values)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
