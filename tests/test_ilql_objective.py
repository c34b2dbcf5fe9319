"""ILQL's objective: arithmetic by hand, an independent float64 reference, and a problem small enough to enumerate."""

import itertools

import pytest
import torch
from torch import Tensor

from dpoctl.objectives.ilql import (
    TokenValues,
    Weights,
    expectile_loss,
    ilql_losses,
    is_last,
    perturbed_logits,
    q_loss,
    q_targets,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    """Two completions of two tokens and one: rewards are 0, 3 and -1."""
    owner = torch.tensor([0, 0, 1])
    assert is_last(owner).tolist() == [False, True, True]
    values = doubles(1.0, 2.0, 4.0)
    targets = q_targets(values, owner, doubles(3.0, -1.0), gamma=0.5)
    assert targets.tolist() == [0.5 * 2.0, 3.0, -1.0]
    assert q_loss(doubles(2.0, 0.0, -1.5), targets).tolist() == [1.0, 9.0, 0.25]
    # u = 1, -2: |0.8 - 0| 1 = 0.8, |0.8 - 1| 4 = 0.8
    assert expectile_loss(doubles(2.0, 0.0), doubles(1.0, 2.0), tau=0.8).tolist() == pytest.approx([0.8, 0.8])
    tokens = TokenValues(
        q=(doubles(2.0, 0.0, -1.5), doubles(1.0, 3.0, -1.0)),
        q_logps=(doubles(-1.0, -2.0, -3.0), doubles(-0.5, -0.5, -0.5)),
        values=values,
        target_q=doubles(2.0, 0.0, 4.0),
        logps=doubles(-0.1, -0.2, -0.3),
        owner=owner,
    )
    found = ilql_losses(tokens, doubles(3.0, -1.0), Weights(tau=0.8, gamma=0.5, cql=0.1, policy=2.0))
    assert found["q"].tolist() == [1.0, 9.0, 0.25]  # the second head is right everywhere
    assert found["value"].tolist() == pytest.approx([0.8, 0.8, 0.0])
    assert found["cql"].tolist() == [1.5, 2.5, 3.5]
    assert found["policy"].tolist() == [0.1, 0.2, 0.3]
    assert found["total"].tolist() == pytest.approx([1 + 0.8 + 0.15 + 0.2, 9 + 0.8 + 0.25 + 0.4, 0.25 + 0.35 + 0.6])


def test_neither_targets_nor_the_end_carry_gradient():
    owner = torch.tensor([0, 0, 1])
    values = doubles(1.0, 2.0, 4.0).requires_grad_()
    assert not q_targets(values, owner, doubles(3.0, -1.0), 0.9).requires_grad
    tokens = TokenValues((values, values), (values, values), values, doubles(5, 5, 5), values, owner)
    assert ilql_losses(tokens, doubles(3.0, -1.0), Weights(0.7, 0.9, 0, 0))["value"].requires_grad
    last_alone = q_targets(values, owner, doubles(3.0, -1.0), gamma=0.0)
    assert last_alone.tolist() == [0.0, 3.0, -1.0]


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.8])
def test_the_minimiser_is_the_expectile(tau):
    """At it tau E[(Q - V)+] = (1 - tau) E[(V - Q)+]; for tau .5 it is the mean."""
    q = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expectile_loss(q, v.expand(50), tau).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    v = v.detach()
    above, below = (q - v).clamp(min=0).mean(), (v - q).clamp(min=0).mean()
    assert tau * above == pytest.approx(float((1 - tau) * below), rel=1e-6)
    if tau == 0.5:
        assert float(v) == pytest.approx(float(q.mean()), abs=1e-8)


def test_perturbed_logits_are_the_paper_s_distribution():
    """softmax of logits + beta Q is log pi + beta (Q - V), renormalised; then the temperature divides both alike."""
    g = torch.Generator().manual_seed(0)
    logits, q = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    v = torch.randn(4, 1, generator=g, dtype=torch.float64)
    expected = (logits.log_softmax(-1) + 1.7 * (q - v)).log_softmax(-1)
    assert torch.allclose(perturbed_logits(logits, q, 1.7).log_softmax(-1), expected, atol=1e-12)
    cooled = (expected / 0.5).log_softmax(-1)
    assert torch.allclose((perturbed_logits(logits, q, 1.7) / 0.5).log_softmax(-1), cooled, atol=1e-12)
    assert torch.equal(perturbed_logits(logits, q, 0.0), logits)


# --- an enumerable problem: completions of two tokens out of three, each with a return

A = 3
COMPLETIONS = list(itertools.product(range(A), repeat=2))


def problem() -> tuple[Tensor, Tensor]:
    """(reference log-probs [A, A] of the completions, returns [A, A]); rows are the first token."""
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(A, generator=g, dtype=torch.float64), torch.randn(A, A, generator=g).double()
    logps = first.log_softmax(0)[:, None] + second.log_softmax(1)
    return logps, torch.randn(A, A, generator=g, dtype=torch.float64)


def expectile(values: Tensor, weights: Tensor, tau: float) -> float:
    """By bisection."""
    low, high = float(values.min()), float(values.max())
    for _ in range(100):
        v = 0.5 * (low + high)
        balance = (weights * (tau * (values - v).clamp(min=0) - (1 - tau) * (v - values).clamp(min=0))).sum()
        low, high = (v, high) if balance > 0 else (low, v)
    return 0.5 * (low + high)


def known_values(logps: Tensor, returns: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(Q of the first token [A], Q of the second [A, A]) at gamma 1: V is the expectile over what the data does."""
    after = logps.exp().sum(1)
    v = [expectile(returns[a], logps[a].exp() / after[a], tau) for a in range(A)]
    return doubles(*v), returns


def trained_values(logps: Tensor, returns: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The same, learned by `ilql_losses` on tables, with targets that follow at once."""
    q = torch.zeros(1 + A, A, dtype=torch.float64, requires_grad=True)  # state 0 is the start, 1 + a follows token a
    v = torch.zeros(1 + A, dtype=torch.float64, requires_grad=True)
    states = torch.tensor([s for a, _ in COMPLETIONS for s in (0, 1 + a)])
    actions = torch.tensor([t for pair in COMPLETIONS for t in pair])
    owner = torch.arange(len(COMPLETIONS)).repeat_interleave(2)
    share = logps.exp().flatten()[owner]
    optimizer = torch.optim.Adam([q, v], lr=0.05)
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 1500) + 1e-4
        at = q[states, actions]
        tokens = TokenValues((at, at), (at * 0, at * 0), v[states], at.detach(), at * 0, owner)
        losses = ilql_losses(tokens, returns.flatten(), Weights(tau, gamma=1.0, cql=0.0, policy=0.0))
        optimizer.zero_grad()
        (share * losses["total"]).sum().backward()
        optimizer.step()
    return q[0].detach(), q[1:].detach()


def value_of(logps: Tensor, returns: Tensor, q: tuple[Tensor, Tensor], beta: float) -> float:
    """The expected return of the policy that is decoded with beta."""
    first, second = logps.logsumexp(1), logps - logps.logsumexp(1, keepdim=True)
    p = perturbed_logits(first, q[0], beta).softmax(0)[:, None] * perturbed_logits(second, q[1], beta).softmax(1)
    return float((p * returns).sum())


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_known_values_of_an_enumerable_problem(tau):
    """Q is the return at the last token, the expectile of what follows at the first; beta sweeps the frontier."""
    logps, returns = problem()
    known, found = known_values(logps, returns, tau), trained_values(logps, returns, tau)
    if tau == 0.5:
        behaviour = logps - logps.logsumexp(1, keepdim=True)
        assert known[0].tolist() == pytest.approx((behaviour.exp() * returns).sum(1).tolist(), abs=1e-9)
    for f, k in zip(found, known, strict=True):
        assert torch.allclose(f, k, atol=0.02)
    values = [value_of(logps, returns, found, beta) for beta in (0.0, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0)]
    assert values[0] == pytest.approx(float((logps.exp() * returns).sum()), abs=1e-9)
    exact = [value_of(logps, returns, known, beta) for beta in (0.0, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0)]
    assert values == pytest.approx(exact, abs=0.02)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(float(returns.max()), abs=0.02)  # here both expectiles find the best first token


def test_the_expectile_goes_from_the_mean_to_the_best():
    logps, returns = problem()
    first = [known_values(logps, returns, tau)[0] for tau in (0.5, 0.9, 0.9999)]
    assert (first[0] < first[1]).all() and (first[1] < first[2]).all()
    assert torch.allclose(first[2], returns.amax(1), atol=0.02)
