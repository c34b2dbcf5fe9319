"""The reward model's objective, Bradley-Terry (2305.18290, eq. 2), and how well its probabilities are calibrated."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log s(r_w - r_l - margin) [P], of rewards [P]."""
    return -F.logsigmoid(chosen - rejected - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)^2 [P], of rewards [P]: Bradley-Terry leaves their sum free (2312.09244)."""
    return (chosen + rejected) ** 2


def calibration(margins: Tensor, bins: int = 10) -> tuple[float, list[tuple[float, float, int]]]:
    """(expected calibration error, [(mean confidence, accuracy, pairs)] of each non-empty bin).

    `margins` [P] are r_w - r_l. The model's confidence in the completion that it prefers is s(|margin|), from 1/2 to 1;
    it is right where the margin is positive, and counts half where it is 0.
    """
    confidence = torch.sigmoid(margins.double().abs())
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = []
    for b in bin_of.unique().tolist():
        members = bin_of == b
        rows.append((confidence[members].mean().item(), right[members].mean().item(), int(members.sum())))
    return sum(n * abs(c - r) for c, r, n in rows) / len(margins), rows
