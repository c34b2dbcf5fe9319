"""Best of n: the expected value, under one reward, of selecting by another; unbiased from one set of N samples."""

import math

import torch
from torch import Tensor


def expected_best(selection_scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value [] of the best of n among N >= n samples: selected by `selection_scores` [N], worth `values` [N].

    sum_i C(i - 1, n - 1) / C(N, n) g_(i) over samples sorted ascending by selection score: the mean over n-subsets.
    Ties in the selection score are broken uniformly at random: the tied samples count with their mean value.
    Raises ValueError for n outside of 1 to N.
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
