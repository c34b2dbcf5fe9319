"""Objectives on single completions that are desirable or not. The notation is that of `preference`, tensors are [P].

A completion y of a prompt has c = log p - log p_ref, and in `label` 1 where it is desirable, 0 where it is not. l_D and
l_U weigh the two kinds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import UNPAIRED
from .pair_logps import PairLogps
from .preference import Objective, known


def kto(p: PairLogps, beta: float, lambda_chosen: float = 1.0, lambda_rejected: float = 1.0) -> Tensor:
    """KTO (arXiv 2402.01306, eq. 8): l_D (1 - s(beta (c - z))) for desirable completions, l_U (1 - s(beta (z - c))) for
    the others.

    z = max(0, `batch_mean`), detached, where `batch_mean` is the mean log-ratio of completions of other prompts: an
    estimate of KL(pi || pi_ref). Raises ValueError without it.
    """
    z = known(p.batch_mean, "kto needs the mean log-ratio of mismatched completions").detach().clamp(min=0.0)
    x = beta * (p.c - z)
    return _by_label(p, lambda_chosen * torch.sigmoid(-x), lambda_rejected * torch.sigmoid(x))


def bco(p: PairLogps, beta: float, lambda_chosen: float = 1.0, lambda_rejected: float = 1.0) -> Tensor:
    """BCO (arXiv 2404.04656): -l_D log s(beta (c - delta)) and -l_U log s(-beta (c - delta)): it tells the kinds apart.

    delta = `running_mean`, detached: half of the mean c of desirable completions over all updates so far, and half of
    that of the others. With a share q of the ratings of y desirable it is least at c = delta + logit(q) / beta. Raises
    ValueError without the mean.
    """
    x = beta * (p.c - known(p.running_mean, "bco needs the running means of c").detach())
    return _by_label(p, -lambda_chosen * F.logsigmoid(x), -lambda_rejected * F.logsigmoid(-x))


def apo_zero_unpaired(p: PairLogps, beta: float, lambda_chosen: float = 1.0, lambda_rejected: float = 1.0) -> Tensor:
    """APO-zero on single completions (arXiv 2408.06266): l_D (1 - s(beta c)) and l_U s(beta c): KTO with z = 0."""
    x = beta * p.c
    return _by_label(p, lambda_chosen * torch.sigmoid(-x), lambda_rejected * torch.sigmoid(x))


def _by_label(p: PairLogps, desirable: Tensor, undesirable: Tensor) -> Tensor:
    return torch.where(known(p.label, "each completion needs a label") > 0.5, desirable, undesirable)


_BY_NAME = {function.__name__: function for function in (kto, bco, apo_zero_unpaired)}
UNPAIRED_LOSSES: dict[str, Objective] = {
    name: Objective(**vars(traits), loss=_BY_NAME[name]) for name, traits in UNPAIRED.items()
}
