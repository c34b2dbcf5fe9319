"""Implicit language Q-learning (2206.11871; the expectile is that of 2110.06169, the conservative term of 2006.04779).

Legend: N completion tokens, the tokens of a completion in order and next to each other; `owner` [N] is the completion
of each. The state h_t is what precedes token a_t. Q(h_t, a_t) is the value of that token, V(h_t) of the state. The
reward is 0 at every token but a completion's last, which gets its return.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """`tau`: the expectile; `gamma`: the discount of a token; `cql` and `policy`: weights of these two terms."""

    tau: float
    gamma: float
    cql: float
    policy: float


class TokenValues(NamedTuple):
    """What a model gives for each completion token, all [N] but `q` and `q_logps`, a tuple of those of the two heads.

    `q`: Q_i(h_t, a_t); `q_logps`: log softmax(Q_i(h_t, .)) at a_t; `values`: V(h_t); `target_q`: the lower of the two
    target heads' Q(h_t, a_t), without gradient; `logps`: the policy's log-probs.
    """

    q: tuple[Tensor, Tensor]
    q_logps: tuple[Tensor, Tensor]
    values: Tensor
    target_q: Tensor
    logps: Tensor
    owner: Tensor


def is_last(owner: Tensor) -> Tensor:
    """Whether each token is the last one of its completion, [N]."""
    return torch.cat([owner[1:] != owner[:-1], owner.new_ones(1, dtype=torch.bool)])


def q_targets(values: Tensor, owner: Tensor, returns: Tensor, gamma: float) -> Tensor:
    """r_t + gamma V(h_{t+1}) [N], without gradient; `returns` [completions] by `owner`.

    A completion's last token ends the episode, also where sampling was cut at the length limit: the return was given to
    the text as it is, and nothing comes after it.
    """
    last = is_last(owner)
    following = torch.cat([values[1:], values.new_zeros(1)]).detach()
    return torch.where(last, returns[owner].to(values.dtype), gamma * following)


def q_loss(q: Tensor, targets: Tensor) -> Tensor:
    """(Q(h_t, a_t) - target)^2 [N]."""
    return (q - targets) ** 2


def expectile_loss(target_q: Tensor, values: Tensor, tau: float) -> Tensor:
    """|tau - 1[u < 0]| u^2 [N] with u = target_q - V: its minimiser is the tau-expectile of Q, for tau .5 the mean."""
    u = target_q - values
    return torch.where(u < 0, 1.0 - tau, tau) * u**2


def ilql_losses(tokens: TokenValues, returns: Tensor, weights: Weights) -> dict[str, Tensor]:
    """The terms by name, [N] each: `q` and `cql` are summed over the two heads; the loss is their `total`."""
    targets = q_targets(tokens.values, tokens.owner, returns, weights.gamma)
    first, second = tokens.q
    found = {
        "q": q_loss(first, targets) + q_loss(second, targets),
        "value": expectile_loss(tokens.target_q, tokens.values, weights.tau),
        "cql": -tokens.q_logps[0] - tokens.q_logps[1],
        "policy": -tokens.logps,
    }
    total = found["q"] + found["value"] + weights.cql * found["cql"] + weights.policy * found["policy"]
    return found | {"total": total}


def perturbed_logits(logits: Tensor, target_q: Tensor, beta: float) -> Tensor:
    """Logits [..., K] of the policy that is decoded: log pi(a|h) + beta (Q(h, a) - V(h)), up to a constant of h.

    `target_q` [..., K] is the lower of the two target heads. The constants, V(h) among them, cancel in the softmax.
    """
    return logits + beta * target_q
