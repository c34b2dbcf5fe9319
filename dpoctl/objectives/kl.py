"""KL divergence between explicit distributions, and the optimum of a reward under a KL penalty.

Log-probs are normalised over the last dimension K (a vocabulary at one step, or all completions of a prompt) and in
nats; leading dimensions are batch. `ref_logps` are the reference's.
"""

import math

from torch import Tensor


def kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Exact KL(policy || reference) [...] of log-probs [..., K].

    An outcome without policy probability contributes 0; one that only the policy gives makes the KL infinite. Summed
    over the steps of the policy's samples it estimates the sequence KL, usually with less variance than log-ratios.
    """
    log_ratio = (logps - ref_logps).masked_fill(logps == -math.inf, 0.0)  # 0 log 0 = 0, also where both are 0
    return (logps.exp() * log_ratio).sum(-1)


def kl_regularised_optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log-probs [..., K] of pi*(y) = pi_ref(y) exp(r(y) / beta) / Z (2305.18290, eq. 4).

    It maximises E[r] - beta KL. With `ref_logps` = -log M for M samples from the reference it is the self-normalised
    estimate of pi*, with weights softmax(r / beta).
    """
    return (ref_logps + rewards / beta).log_softmax(-1)


def optimal_point(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(expected reward, KL to the reference), each [...], of the KL-regularised optimum of rewards [..., K]."""
    logps = kl_regularised_optimum(ref_logps, rewards, beta)
    return (logps.exp() * rewards).sum(-1), kl(logps, ref_logps)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1)/n: an upper bound on the KL between best-of-n and its reference, exact without ties in reward."""
    return math.log(n) - (n - 1) / n
