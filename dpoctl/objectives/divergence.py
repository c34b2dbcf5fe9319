"""f-divergences in place of the reverse KL (f-DPO, arXiv 2309.16240): what stands for a log-ratio in D.

With the penalty E_ref[f(pi / pi_ref)] the optimal policy's reward is beta f'(pi / pi_ref) up to a constant of the
prompt, which D cancels. Here x = log(pi / pi_ref), and each function gives f' shifted by a constant to 0 at x = 0.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT = 30.0  # nats up to which an exponential is exact: beyond, its tangent keeps losses and gradients finite


def reverse_kl(x: Tensor, alpha: float = 0.0) -> Tensor:
    """f(u) = u log u: f' is the log-ratio itself (DPO)."""
    return x


def forward_kl(x: Tensor, alpha: float = 0.0) -> Tensor:
    """f(u) = -log u: f' = -1/u, so 1 - exp(-x)."""
    return -_expm1(-x)


def js(x: Tensor, alpha: float = 0.0) -> Tensor:
    """Jensen-Shannon, f(u) = u log u - (u + 1) log((u + 1)/2): f' = log(2u / (1 + u))."""
    return math.log(2.0) + F.logsigmoid(x)


def alpha_divergence(x: Tensor, alpha: float = 0.5) -> Tensor:
    """f(u) = (u^(1-a) - (1-a) u - a) / (a (a-1)), 0 < a < 1: f' = (1 - u^-a) / a. It nears the reverse KL as a falls to
    0, and the forward KL as a rises to 1."""
    return -_expm1(-alpha * x) / alpha


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued by its tangent beyond `_EXACT`."""
    capped = x.clamp(max=_EXACT)
    return torch.expm1(capped) + torch.exp(capped) * (x - capped)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse-kl": reverse_kl,
    "forward-kl": forward_kl,
    "js": js,
    "alpha": alpha_divergence,
}
