"""The preference objectives: one table of pure functions. DPO is Rafailov et al. 2023 (arXiv 2305.18290).

Legend, all tensors [P], one entry per pair:
  w, l      the chosen and the rejected completion
  log p     a response's summed log-prob under the policy, in nats; log p_ref under the reference
  n         a response's number of tokens, EOS counted; "mean log p" is log p / n
  c, r      log p_w - log p_ref_w, log p_l - log p_ref_l; beta c and beta r are DPO's implicit rewards
  D         c - r
  s, e      the sigmoid; the assumed fraction of flipped labels (label smoothing)

A loss is [P]: the caller averages it over the pairs of the global batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import OBJECTIVES, Traits


@dataclass(frozen=True)
class PairLogps:
    """The inputs of a loss, all [P] float32; the reference's are zeros where a loss needs none."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    batch_mean: Tensor | None = None  # KTO's z before its clamp: mean of c and r over the global batch, detached

    @property
    def c(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def r(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def d(self) -> Tensor:
        return self.c - self.r

    @property
    def mean_d(self) -> Tensor:
        """D from per-token means."""
        return self.c / self.chosen_tokens - self.r / self.rejected_tokens

    @property
    def mean_chosen(self) -> Tensor:
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        return self.rejected / self.rejected_tokens


def sigmoid(p: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, eq. 7: -log s(beta D); smoothed, cDPO (Mitchell 2023): -(1-e) log s(beta D) - e log s(-beta D)."""
    x = beta * p.d
    return -(1.0 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust(p: PairLogps, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO (arXiv 2403.00409): [-(1-e) log s(beta D) + e log s(-beta D)] / (1-2e), with e < 1/2.

    Where a fraction e of the labels is flipped, its expectation is DPO's loss on the true labels. For e > 0 a single
    pair's loss has no lower bound: for large D it falls by e beta / (1-2e) per unit of D.
    """
    x, e = beta * p.d, label_smoothing
    return (-(1.0 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1.0 - 2.0 * e)


def ipo(p: PairLogps, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) with D of summed log-probs: (D - 1/(2 tau))^2, beta in place of tau."""
    return (p.d - 1.0 / (2.0 * beta)) ** 2


def ipo_mean(p: PairLogps, beta: float) -> Tensor:
    """IPO with D from per-token means, as some implementations read it: a different objective."""
    return (p.mean_d - 1.0 / (2.0 * beta)) ** 2


def hinge(p: PairLogps, beta: float) -> Tensor:
    """Hinge loss, as in SLiC-HF (arXiv 2305.10425): max(0, 1 - beta D)."""
    return torch.relu(1.0 - beta * p.d)


def rpo(p: PairLogps, beta: float, alpha: float = 1.0) -> Tensor:
    """RPO (arXiv 2404.19733): DPO + alpha times the chosen completion's token-mean negative log-likelihood."""
    return sigmoid(p, beta) - alpha * p.mean_chosen


def dpop(p: PairLogps, beta: float, lambda_: float = 50.0) -> Tensor:
    """DPOP (arXiv 2402.13228): -log s(beta (D - lambda max(0, -c))), which penalises a falling chosen log-prob."""
    return -F.logsigmoid(beta * (p.d - lambda_ * torch.relu(-p.c)))


def sigmoid_norm(p: PairLogps, beta: float) -> Tensor:
    """Length-normalised DPO: eq. 7 with D from per-token means."""
    return -F.logsigmoid(beta * p.mean_d)


def simpo(p: PairLogps, beta: float, gamma: float = 1.0) -> Tensor:
    """SimPO (arXiv 2405.14734): -log s(beta mean log p_w - beta mean log p_l - gamma), without a reference."""
    return -F.logsigmoid(beta * (p.mean_chosen - p.mean_rejected) - gamma)


def orpo(p: PairLogps, beta: float, lambda_: float = 0.1) -> Tensor:
    """ORPO (arXiv 2403.07691): token-mean NLL_w - lambda log s(log odds_w - log odds_l), odds from exp(mean log p).

    Without a reference; beta is not read.
    """
    return -p.mean_chosen - lambda_ * F.logsigmoid(_log_odds(p.mean_chosen) - _log_odds(p.mean_rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0; finite, with a finite gradient, where p is 1 within rounding."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    half = -math.log(2.0)
    near = torch.log(-torch.expm1(logp))  # log(1 - p), accurate for p near 1
    far = torch.log1p(-torch.exp(logp.clamp(max=half)))  # accurate for small p; clamped to keep the gradient finite
    return logp - torch.where(logp > half, near, far)


def kto(p: PairLogps, beta: float, lambda_chosen: float = 1.0, lambda_rejected: float = 1.0) -> Tensor:
    """KTO (arXiv 2402.01306) on a pair's two halves: lambda_D (1 - s(beta (c - z))) + lambda_U (1 - s(beta (z - r))).

    z = max(0, mean of c and r over the global batch), detached, from `batch_mean`. Raises ValueError without it.
    """
    if p.batch_mean is None:
        raise ValueError("kto needs the mean of c and r over the global batch")
    z = p.batch_mean.detach().clamp(min=0.0)
    return lambda_chosen * torch.sigmoid(-beta * (p.c - z)) + lambda_rejected * torch.sigmoid(-beta * (z - p.r))


def unlikelihood(p: PairLogps, beta: float, alpha: float = 0.1) -> Tensor:
    """Unlikelihood (2305.18290, section 6 and appendix): -log p_w + alpha log p_l. No lower bound; beta is not read."""
    return -p.chosen + alpha * p.rejected


@dataclass(frozen=True, kw_only=True)
class Objective(Traits):
    """A loss [P] of `(PairLogps, beta, **options)` with its traits."""

    loss: Callable[..., Tensor]


_FUNCTIONS = (
    *(sigmoid, robust, ipo, ipo_mean, hinge, rpo, dpop, sigmoid_norm, simpo, orpo, kto),
    unlikelihood,
)
_BY_NAME = {function.__name__.replace("_", "-"): function for function in _FUNCTIONS}
LOSSES: dict[str, Objective] = {
    name: Objective(**vars(traits), loss=_BY_NAME[name]) for name, traits in OBJECTIVES.items()
}
