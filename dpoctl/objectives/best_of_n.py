"""Best of n: an unbiased estimate of the reward that selection by another reward attains, from one set of N samples."""

import math

import torch
from torch import Tensor


def expected_best(selection_scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value [] of the best of n samples, from N >= n: selected by `selection_scores` [N], worth `values` [N].

    sum_i C(i - 1, n - 1) / C(N, n) g_(i) over samples sorted by ascending selection score, which is the mean over all
    subsets of n. Samples with equal selection scores are equally likely to be selected: each counts with their mean.
    Raises ValueError for n outside 1 to N.
    """
    total = len(selection_scores)
    if not 1 <= n <= total:
        raise ValueError(f"n {n} of {total} samples")
    selection_scores, order = selection_scores.double().sort()
    values = values.double()[order]
    _, group = selection_scores.unique_consecutive(return_inverse=True)
    counts = torch.bincount(group).double()
    values = (torch.zeros(len(counts), dtype=torch.float64).index_add(0, group, values) / counts)[group]
    subsets = math.comb(total, n)
    weights = torch.tensor([math.comb(i, n - 1) / subsets for i in range(total)], dtype=torch.float64)
    return weights @ values
