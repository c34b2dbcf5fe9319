"""Distributions of the next token by sorting, and a test of what was drawn against them."""

import torch

from dpoctl.inference.generate import Sampling


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-square test; cells with less than five expected counts are one."""
    total = counts.sum()
    assert not counts[probabilities == 0].any(), "a token of probability 0 was drawn"
    large = probabilities * total >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = total * torch.cat([probabilities[large], probabilities[~large].sum()[None]])
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), statistic / 2).item()


def restricted(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution of the next token, by sorting."""
    p = torch.softmax(logits.double() / sampling.temperature, -1)
    order = p.argsort(descending=True)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    before = p[order].cumsum(0) - p[order]
    p[order[before >= sampling.top_p]] = 0
    return p / p.sum()
