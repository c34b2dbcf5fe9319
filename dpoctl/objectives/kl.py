"""KL divergence between distributions that are written out, and what maximising a reward under a KL penalty reaches.

Log-probs are normalised over the last dimension K (a vocabulary at one step, or all completions of a prompt) and in
nats; leading dimensions are batch. `ref_logps` are the reference's.
"""

import math

from torch import Tensor


def kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Exact KL(policy || reference) [...] of log-probs [..., K].

    An outcome that the policy never gives counts 0; one that only the policy gives makes the KL infinite. Summed over
    the steps of a policy's own samples it estimates the sequence KL, as a rule with less variance than log-ratios do.
    """
    log_ratio = (logps - ref_logps).masked_fill(logps == -math.inf, 0.0)  # 0 log 0 = 0, also where both are 0
    return (logps.exp() * log_ratio).sum(-1)


def kl_regularised_optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log-probs [..., K] of pi*(y) = pi_ref(y) exp(r(y) / beta) / Z (2305.18290, eq. 4).

    It maximises E[r] - beta KL. With `ref_logps` = -log M over M samples of the reference it is the self-normalised
    estimate of the same: the weights are softmax(r / beta).
    """
    return (ref_logps + rewards / beta).log_softmax(-1)


def optimal_point(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(expected reward, KL to the reference), each [...], of the KL-regularised optimum of rewards [..., K]."""
    logps = kl_regularised_optimum(ref_logps, rewards, beta)
    return (logps.exp() * rewards).sum(-1), kl(logps, ref_logps)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1)/n: at least the KL to the reference of the best of n samples; equal where no rewards tie."""
    return math.log(n) - (n - 1) / n
