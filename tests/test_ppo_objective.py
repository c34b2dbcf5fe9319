"""PPO's formulas by worked arithmetic and closed form; on a problem small enough to enumerate it finds the optimum."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpoctl.objectives import ppo
from dpoctl.objectives.kl import kl, kl_regularised_optimum


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def random_batch(seed: int = 0, lengths=(4, 1, 3)):
    g = torch.Generator().manual_seed(seed)
    mask = mask_of(*lengths)
    rewards, values = (torch.randn(mask.shape, generator=g, dtype=torch.float64) for _ in range(2))
    return rewards, values, mask


def test_token_rewards_sum_to_score_minus_beta_kl_with_the_score_on_the_last_token():
    mask = mask_of(3, 1)
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 99.0, 99.0]])
    ref = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, -99.0, 0.0]])
    rewards = ppo.token_rewards(logps, ref, torch.tensor([2.0, -1.0]), mask, 0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 0.1, 2.0], [-0.9, 0.0, 0.0]]))
    log_ratio = torch.where(mask, logps - ref, 0.0).sum(1)
    assert torch.allclose(rewards.sum(1), torch.tensor([2.0, -1.0]) - 0.1 * log_ratio)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} (1506.02438, eq. 16), written out episode by episode."""
    rewards, values, mask = random_batch()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(mask.sum(1).tolist()):
        v = [*values[b, :n].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** i * d for i, d in enumerate(deltas[t:]))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


def test_padding_changes_nothing():
    rewards, values, mask = random_batch()
    noisy_rewards, noisy_values = (torch.where(mask, x, torch.full_like(x, 1e6)) for x in (rewards, values))
    for a, b in zip(
        ppo.gae(rewards, values, mask, 1.0, 0.9), ppo.gae(noisy_rewards, noisy_values, mask, 1.0, 0.9), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(ppo.whiten(rewards, mask), ppo.whiten(noisy_rewards, mask))


@given(st.integers(0, 1000))
def test_whitening_has_mean_zero_and_deviation_one(seed):
    x, _, mask = random_batch(seed, (5, 2, 7))
    white = ppo.whiten(x, mask)
    assert white[mask].mean().abs() < 1e-12 and white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    kept = ppo.whiten(x, mask, keep_mean=True)
    assert kept[mask].mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-12)
    assert not white[~mask].any() and not kept[~mask].any()


def test_both_clips_by_hand():
    """Ratios 1.5 and 0.5 with clip 0.2; values 2 and -2 from 0, clipped at 0.5."""
    logps, old = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])), torch.zeros(5)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    losses, clipped = ppo.policy_loss(logps, old, advantages, 0.2)
    assert torch.allclose(losses, torch.tensor([-1.2, 1.5, -0.5, 0.8, -2.2]))
    assert clipped.tolist() == [True, False, False, True, False]
    losses, held = ppo.value_loss(torch.tensor([2.0, 2.0, 0.25]), torch.zeros(3), torch.tensor([1.0, 3.0, 1.0]), 0.5)
    # (2-1)^2 against (.5-1)^2; (2-3)^2 against (.5-3)^2; within the clip
    assert torch.allclose(losses, torch.tensor([0.5, 3.125, 0.28125])) and held.tolist() == [False, True, False]


def test_a_clipped_token_gets_no_gradient():
    logps = torch.log(torch.tensor([1.5, 0.5])).requires_grad_()
    ppo.policy_loss(logps, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)[0].sum().backward()
    assert not logps.grad.any()


@pytest.mark.parametrize(
    ("kl_", "factor"), [(6.0, 1.0), (6.6, 1 + 0.1 * 0.0256), (60.0, 1 + 0.2 * 0.0256), (0.0, 1 - 0.2 * 0.0256)]
)
def test_the_kl_controllers_formula(kl_, factor):
    assert ppo.next_kl_coef(0.2, kl_, 6.0, 256, 10000) == pytest.approx(0.2 * factor, rel=1e-12)


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=8), min_size=1, max_size=6))
def test_running_moments_are_those_of_everything_seen(batches):
    moments = ppo.RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    every = np.concatenate(batches)
    assert moments.mean == pytest.approx(every.mean(), abs=1e-9)
    assert moments.m2 / moments.count == pytest.approx(every.var(), abs=1e-7)


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns, returns) == 1.0
    assert ppo.explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3.0)


def test_ppo_finds_the_kl_regularised_optimum():
    """With a fixed coefficient, on 13 completions of up to two tokens: pi_ref exp(r / beta) / Z.

    Tabular, every completion weighted by its probability in place of sampling, so only the objective is at work: the
    fixed point of PPO with per-token KL rewards. Total variation at most 0.01.
    """
    tokens, end, beta = 3, 3, 0.5
    completions = [(end,), *((a, end) for a in range(tokens)), *itertools.product(range(tokens), repeat=2)]
    g = torch.Generator().manual_seed(3)
    ref = torch.randn(1 + tokens, tokens + 1, generator=g, dtype=torch.float64)
    reward = torch.randn(len(completions), generator=g, dtype=torch.float64)
    lengths = [len(c) for c in completions]
    mask = mask_of(*lengths)

    def token_logps(tables: torch.Tensor) -> torch.Tensor:
        s, out = tables.log_softmax(-1), []
        for c in completions:
            row = [s[0 if t == 0 else 1 + c[0], token] for t, token in enumerate(c)]
            out.append(torch.stack(row + [s.new_zeros(())] * (2 - len(row))))
        return torch.stack(out)

    tables = ref.clone().requires_grad_()
    baseline = torch.zeros(len(completions), 2, dtype=torch.float64)
    optimizer = torch.optim.Adam([tables], lr=0.02)
    with torch.no_grad():
        ref_logps = token_logps(ref)
    for _ in range(400):
        with torch.no_grad():
            old = token_logps(tables)
            weight = old.sum(1).exp()
            rewards = ppo.token_rewards(old, ref_logps, reward, mask, beta)
            advantages, returns = ppo.gae(rewards, baseline, mask, 1.0, 1.0)
            # the exact value of each state under the policy: the start, and after each first token
            value = torch.zeros_like(baseline)
            value[:, 0] = (weight * returns[:, 0]).sum()
            for a in range(tokens):
                after = torch.tensor([c[0] == a for c in completions])
                value[after, 1] = (weight[after] * returns[after, 1]).sum() / weight[after].sum()
            advantages, _ = ppo.gae(rewards, value, mask, 1.0, 1.0)
        for _ in range(4):
            losses, _ = ppo.policy_loss(token_logps(tables)[mask], old[mask], advantages[mask], 0.2)
            optimizer.zero_grad()
            (losses * weight[:, None].expand(-1, 2)[mask]).sum().backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.99
    with torch.no_grad():
        reached = token_logps(tables).sum(1)
    optimum = kl_regularised_optimum(ref_logps.sum(1), reward, beta)
    assert 0.5 * (reached.exp() - optimum.exp()).abs().sum() < 0.01
    assert 0.5 * (ref_logps.sum(1).exp() - optimum.exp()).abs().sum() > 0.2  # there was something to find
    assert kl(reached, ref_logps.sum(1)) > 0.1
