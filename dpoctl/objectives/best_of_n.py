"""Best of n: what choosing by one reward is worth under another, from one set of N samples, without bias."""

import math

import torch
from torch import Tensor


def expected_best(selection_scorer: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value [] of the best of n among N >= n samples: chosen by `chooser` [N], worth `values` [N].

    sum_i C(i - 1, n - 1) / C(N, n) g_(i) over samples sorted ascending by the chooser: the mean over all subsets of n.
    Where the chooser ties, any of the tied is equally likely: they share their mean value.
    Raises ValueError for n outside of 1 to N.
    """
    total = len(selection_scorer)
    if not 1 <= n <= total:
        raise ValueError(f"n {n} of {total} samples")
    selection_scorer, order = selection_scorer.double().sort()
    values = values.double()[order]
    _, group = selection_scorer.unique_consecutive(return_inverse=True)
    counts = torch.bincount(group).double()
    values = (torch.zeros(len(counts), dtype=torch.float64).index_add(0, group, values) / counts)[group]
    subsets = math.comb(total, n)
    weights = torch.tensor([math.comb(i, n - 1) / subsets for i in range(total)], dtype=torch.float64)
    return weights @ values
