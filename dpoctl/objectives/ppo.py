"""PPO for language models (Ziegler et al. 2019, 1909.08593; Schulman et al. 2017, 1707.06347; GAE: 1506.02438).

Legend: B episodes (one prompt, one sampled response), T the longest response, EOS counted; `mask` [B, T] is true on a
response's tokens and false after its end. Per-token tensors are [B, T], or [N] where they hold the masked tokens only.
Log-probs are those of the sampling distribution: logits divided by the temperature.
"""

import torch
from torch import Tensor


def token_rewards(logps: Tensor, ref_logps: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards [B, T]: -beta (log pi - log pi_ref) at each token, the score [B] added at the last one."""
    rewards = torch.where(mask, -kl_coef * (logps - ref_logps), 0.0)
    last = mask.sum(1) - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [B, T] and 0 after the end.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lambda A_{t+1}; the return is A + V. Rewards and
    values after a response's end are ignored.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        following = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * following
        advantages[:, t] = following
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the masked entries, plus the mean with `keep_mean`; 0 elsewhere."""
    values = x[mask]
    mean, variance = values.mean(), values.var(correction=0)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8) + (mean if keep_mean else 0.0)
    return whitened.masked_fill(~mask, 0.0)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(losses [N], whether they are clipped [N]): max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old."""
    ratio = (logps - old_logps).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(losses [N], whether they are clipped [N]): half the larger of (V - R)^2 and (clip(V, V_old +- eps) - R)^2."""
    clipped_values = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def next_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The adaptive KL controller: beta (1 + e n / horizon) with e = clip(KL / target - 1, -0.2, 0.2)."""
    error = min(0.2, max(-0.2, kl / target - 1.0))
    return kl_coef * (1.0 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns), of [N]; 0 for constant returns."""
    variance = returns.var(correction=0)
    return float(1.0 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


class RunningMoments:
    """Mean and variance of all scores seen so far, by Chan's pairwise update."""

    def __init__(self, count: int = 0, mean: float = 0.0, m2: float = 0.0):
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, values: Tensor) -> None:
        """Include `values` [N]."""
        n, mean = len(values), float(values.double().mean())
        m2, delta, total = float(((values.double() - mean) ** 2).sum()), mean - self.mean, self.count + n
        self.mean += delta * n / total
        self.m2 += m2 + delta**2 * self.count * n / total
        self.count = total

    def normalize(self, values: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance + 1e-8)."""
        return (values - self.mean) / (self.m2 / max(self.count, 1) + 1e-8) ** 0.5
