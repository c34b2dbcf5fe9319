"""The preference objectives: one table of pure functions. DPO is Rafailov et al. 2023 (arXiv 2305.18290).

Legend, all tensors [P], one entry per pair:
  w, l      the chosen and the rejected completion
  log p     a response's summed log-prob under the policy, in nats; log p_ref under the reference
  n         a response's number of tokens, EOS counted; "mean log p" is log p / n
  c, r      log p_w - log p_ref_w, log p_l - log p_ref_l; beta c and beta r are DPO's implicit rewards
  D         c - r
  s, e      the sigmoid; the assumed fraction of flipped labels (label smoothing)

A loss is [P]: the caller averages it over the pairs of the global batch. What a loss reads of the other pairs of the
batch is an input, so that the loss of a pair depends neither on its micro-batch nor on its rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import OBJECTIVES, Traits, parse_loss, traits_of
from .pair_logps import PairLogps


def sigmoid(p: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, eq. 7: -log s(beta D); smoothed, cDPO (Mitchell 2023): -(1-e) log s(beta D) - e log s(-beta D).

    With soft labels q, the probability that w is better, 1-e becomes q (1-e) + (1-q) e. For e = 0 its minimiser on full
    support is pi_ref exp(s / (beta tau)) / Z, where q is the sigmoid of the difference of the scores s over tau.
    """
    x, (won, lost) = beta * p.d, _smoothed(p, label_smoothing)
    return -won * F.logsigmoid(x) - lost * F.logsigmoid(-x)


def robust(p: PairLogps, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO (arXiv 2403.00409): [-(1-e) log s(beta D) + e log s(-beta D)] / (1-2e), with e < 1/2.

    Where a fraction e of the labels is flipped, its expectation is DPO's loss on the true labels. For e > 0 a single
    pair's loss has no lower bound: for large D it falls by e beta / (1-2e) per unit of D. Soft labels q, of which a
    fraction e is flipped too, make it the mean over both orders: (q-e) and (1-q-e) in place of (1-e) and -e.
    """
    x, e = beta * p.d, label_smoothing
    won, lost = (1.0 - e, -e) if p.label is None else (p.label - e, 1.0 - p.label - e)
    return (-won * F.logsigmoid(x) - lost * F.logsigmoid(-x)) / (1.0 - 2.0 * e)


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
    """RPO (arXiv 2404.19733): DPO + alpha times the chosen completion's token-mean negative log-likelihood.

    Soft labels concern its first term."""
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


def distill(p: PairLogps, beta: float) -> Tensor:
    """Reward distillation (arXiv 2405.19316): (beta D - (s_w - s_l))^2, of the completions' scores in `gap`.

    With the policy of the round before as reference it is REBEL's regression (2404.16767, eta = 1/beta). Its
    minimiser on full support is pi_ref exp(s / beta) / Z. Raises ValueError without scores.
    """
    return (beta * p.d - known(p.gap, "distill needs the scores of both completions")) ** 2


def exo_pair(p: PairLogps, beta: float, label_smoothing: float = 0.001) -> Tensor:
    """EXO on a pair (arXiv 2402.00856, eq. 16): KL(q || t) with q = (s(beta D), s(-beta D)) and t = (1-e, e), e > 0.

    The reverse of cDPO's KL: it is mode-seeking. Soft labels change t as in `sigmoid`.
    """
    x, (won, lost) = beta * p.d, _smoothed(p, label_smoothing)
    log_won, log_lost = (torch.as_tensor(t, dtype=x.dtype, device=x.device).log() for t in (won, lost))
    return torch.sigmoid(x) * (F.logsigmoid(x) - log_won) + torch.sigmoid(-x) * (F.logsigmoid(-x) - log_lost)


def nca_pair(p: PairLogps, beta: float) -> Tensor:
    """NCA on a pair (arXiv 2402.05369, two completions): -log s(beta c) - 1/2 log s(-beta c) - 1/2 log s(-beta r).

    It optimises each log-ratio by itself, so that chosen completions do not lose probability.
    """
    return -F.logsigmoid(beta * p.c) - 0.5 * F.logsigmoid(-beta * p.c) - 0.5 * F.logsigmoid(-beta * p.r)


def bco_pair(p: PairLogps, beta: float) -> Tensor:
    """BCO on a pair's two halves (arXiv 2404.04656): -log s(beta (c - delta)) - log s(-beta (r - delta)).

    delta is the mean of c and r over all updates so far, detached, from `running_mean`. Raises ValueError without it.
    """
    delta = known(p.running_mean, "bco_pair needs the running mean of c and r").detach()
    return -F.logsigmoid(beta * (p.c - delta)) - F.logsigmoid(-beta * (p.r - delta))


def sppo_hard(p: PairLogps, beta: float) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675, eq. 4.7 with P = 1 and 0): (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2."""
    return (p.c - 0.5 / beta) ** 2 + (p.r + 0.5 / beta) ** 2


def aot(p: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired (arXiv 2406.05882): DPO's smoothed loss of u - v, where u = log p_w - log p_l and v is that of the
    reference with the same rank in the global batch: the policy's margins dominate as a distribution.

    v is `ranks.margin`. Raises ValueError without it.
    """
    ranks = known(p.ranks, "aot needs what has the same rank in the global batch")
    return _logistic(beta * (p.chosen - p.rejected - ranks.margin), label_smoothing)


def aot_unpaired(p: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): DPO's smoothed loss of c - r, each c with the r of the same rank in the batch.

    A pair's c and r have different partners, `ranks.rejected` and `ranks.chosen`: the value is half of both terms, so
    that each counts once in the batch, the gradient that of both. Raises ValueError without them.
    """
    ranks = known(p.ranks, "aot_unpaired needs what has the same rank in the global batch")
    of_c = _logistic(beta * (p.c - ranks.rejected), label_smoothing)
    both = of_c + _logistic(beta * (ranks.chosen - p.r), label_smoothing)
    return both - 0.5 * both.detach()


def apo_zero(p: PairLogps, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): 1 - s(beta c) + s(beta r); for chosen completions that beat the policy's."""
    return torch.sigmoid(-beta * p.c) + torch.sigmoid(beta * p.r)


def apo_down(p: PairLogps, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): s(beta c) + 1 - s(beta D); the policy is better than chosen completions."""
    return torch.sigmoid(beta * p.c) + torch.sigmoid(-beta * p.d)


def discopop(p: PairLogps, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414, eq. 5): (1 - m) log(1 + exp(-x)) + m exp(-x), where
    x = beta D and m = s(x / tau).
    """
    x = beta * p.d
    # m exp(-x) = exp(log m - x): it falls again far below 0, where exp(-x) alone would overflow
    exponential = torch.exp((F.logsigmoid(x / discopop_tau) - x).clamp(max=60.0))
    return -torch.sigmoid(-x / discopop_tau) * F.logsigmoid(x) + exponential


def sft(p: PairLogps, beta: float) -> Tensor:
    """The chosen completions' negative log-likelihood per token, over the tokens of the global batch: -log p_w over the
    mean number of tokens, `mean_tokens`. A term of a sum, as in MPO (arXiv 2411.10442). Beta is not read.

    Raises ValueError without `mean_tokens`.
    """
    mean: float = known(p.mean_tokens, "sft needs the mean number of chosen tokens of the global batch")
    return -p.whole_chosen / mean


def _smoothed(p: PairLogps, e: float) -> tuple[Tensor | float, Tensor | float]:
    """The probabilities that w and that l is better: (1-e, e), or a pair's own label smoothed by e."""
    if p.label is None:
        return 1.0 - e, e
    won = p.label * (1.0 - e) + (1.0 - p.label) * e
    return won, 1.0 - won


def _logistic(x: Tensor, e: float) -> Tensor:
    return -(1.0 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


T = TypeVar("T")


def known(value: T | None, otherwise: str) -> T:
    if value is None:
        raise ValueError(otherwise)
    return value


@dataclass(frozen=True, kw_only=True)
class Objective(Traits):
    """A loss [P] of `(PairLogps, beta, **options)` with its traits."""

    loss: Callable[..., Tensor]


_FUNCTIONS = (
    *(sigmoid, robust, ipo, ipo_mean, hinge, rpo, dpop, sigmoid_norm, simpo, orpo, kto, unlikelihood),
    *(distill, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft),
)
_BY_NAME = {function.__name__: function for function in _FUNCTIONS}
LOSSES: dict[str, Objective] = {
    name: Objective(**vars(traits), loss=_BY_NAME[name.replace("-", "_")]) for name, traits in OBJECTIVES.items()
}


@dataclass(frozen=True)
class Sum:
    """A weighted sum of losses; each term takes of the options those that it reads."""

    terms: tuple[tuple[str, float], ...]

    def __call__(self, p: PairLogps, beta: float, **options: float) -> Tensor:
        """[P], as the loss of one term."""
        return torch.stack([weight * self._term(name, p, beta, options) for name, weight in self.terms]).sum(0)

    def _term(self, name: str, p: PairLogps, beta: float, options: dict[str, float]) -> Tensor:
        objective = LOSSES[name]
        return objective.loss(p, beta, **{key: value for key, value in options.items() if key in objective.options})


@lru_cache
def objective_of(text: str) -> Objective:
    """The objective that `--loss NAME` or `--loss NAME:WEIGHT,...` names. Raises ValueError as `parse_loss` does."""
    terms = parse_loss(text)
    if len(terms) == 1 and terms[0][1] == 1.0:
        return LOSSES[terms[0][0]]
    return Objective(**vars(traits_of(text)), loss=Sum(terms))
