"""Problems small enough to write out: what DPO and IPO converge to against the closed forms of their papers.

Three prompts; a completion is at most two of three tokens and ends by itself or after the second, which makes 13
completions. The policy is autoregressive and tabular: for each prompt next-token logits for the first step, and for the
second given the first token. So it can be any distribution over completions, and what remains to differ from the closed
form is the objective's doing. All in float64.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpoctl.objectives.divergence import DIVERGENCES
from dpoctl.objectives.kl import best_of_n_kl_bound, kl, kl_regularised_optimum, optimal_point
from dpoctl.objectives.pair_logps import PairLogps
from dpoctl.objectives.preference import LOSSES
from dpoctl.objectives.unpaired import UNPAIRED_LOSSES

PROMPTS, TOKENS, END = 3, 3, 3
COMPLETIONS = [(END,), *((a, END) for a in range(TOKENS)), *itertools.product(range(TOKENS), repeat=2)]
K = len(COMPLETIONS)
PAIRS = torch.tensor(list(itertools.permutations(range(K), 2)))  # [156, 2] (chosen, rejected)
LENGTHS = torch.tensor([float(len(c)) for c in COMPLETIONS], dtype=torch.float64)


def steps(tables: Tensor) -> Tensor:
    """Next-token log-probs [PROMPTS, 1 + TOKENS, TOKENS + 1]: state 0 is the start, state 1 + a follows token a."""
    return tables.log_softmax(-1)


def completion_logps(tables: Tensor) -> Tensor:
    """Summed log-probs [PROMPTS, K] of all completions."""
    s = steps(tables)
    columns = [sum(s[:, 0 if t == 0 else 1 + c[0], token] for t, token in enumerate(c)) for c in COMPLETIONS]
    return torch.stack(columns, dim=1)


def world(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(tables of the reference, rewards [PROMPTS, K]), random."""
    g = torch.Generator().manual_seed(seed)
    tables = torch.randn(PROMPTS, 1 + TOKENS, TOKENS + 1, generator=g, dtype=torch.float64)
    return tables, torch.randn(PROMPTS, K, generator=g, dtype=torch.float64)


def bradley_terry(rewards: Tensor) -> Tensor:
    """P(y beats y') [PROMPTS, K, K] under a reward."""
    return torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])


def train(name: str, weights: Tensor, ref_tables: Tensor, beta: float, rows: dict | None = None, **options) -> Tensor:
    """Log-probs [PROMPTS, K] of the policy that minimises the weighted loss over all ordered pairs, from the reference.

    weights [PROMPTS, 156]: how often the pair's first completion was preferred to its second. `rows`: what else the
    loss reads, such as the `gap` [PROMPTS, 156] of the scores.
    """
    more = {key: value.reshape(-1) if isinstance(value, Tensor) else value for key, value in (rows or {}).items()}
    ref = completion_logps(ref_tables)
    tables = ref_tables.clone().requires_grad_()
    w, l = PAIRS.unbind(1)  # noqa: E741
    optimiser = torch.optim.LBFGS(
        [tables], lr=1.0, max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        policy = completion_logps(tables)
        lengths = LENGTHS.expand(PROMPTS, K)
        sides = (policy[:, w], policy[:, l], ref[:, w], ref[:, l], lengths[:, w], lengths[:, l])
        losses = LOSSES[name].loss(PairLogps(*(t.reshape(-1) for t in sides), **more), beta, **options)
        total = (weights.reshape(-1) * losses).sum() / weights.sum()
        total.backward()
        return total

    optimiser.step(closure)
    return completion_logps(tables.detach())


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """[PROMPTS] distances of two sets of log-probs [PROMPTS, K]."""
    return 0.5 * (a.exp() - b.exp()).abs().sum(-1)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_dpo_reaches_the_kl_regularised_optimum(beta):
    """Exact Bradley-Terry labels, each pair in both orders by its probability: pi_ref exp(r / beta) / Z (eq. 4)."""
    tables, rewards = world()
    labels = bradley_terry(rewards)[:, PAIRS[:, 0], PAIRS[:, 1]]
    optimum = kl_regularised_optimum(completion_logps(tables), rewards, beta)
    assert total_variation(completion_logps(tables), optimum).min() > 0.1  # the reference is not the optimum
    reached = train("sigmoid", labels, tables, beta)
    # The minimum is exact, so only the optimiser's stop (gradient 1e-10, float64) remains
    assert total_variation(reached, optimum).max() < 1e-6
    # and is it this beta's optimum alone
    assert total_variation(reached, kl_regularised_optimum(completion_logps(tables), rewards, 1.2 * beta)).min() > 1e-2


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, s_w - s_l), each [PROMPTS, 156]: every pair once, the completion with the higher score chosen."""
    gap = scores[:, PAIRS[:, 0]] - scores[:, PAIRS[:, 1]]
    return (gap > 0).double(), gap


@pytest.mark.parametrize(("beta", "tau"), [(1.0, 1.0), (0.5, 0.4), (0.1, 3.0)])
def test_scores_in_the_loss_reach_the_optimum_that_hard_labels_do_not(beta, tau):
    """The higher score is chosen: soft labels and distillation give pi_ref exp(s / (beta tau)) / Z all the same."""
    tables, scores = world(9)
    once, gap = ranked(scores)
    optimum = kl_regularised_optimum(completion_logps(tables), scores, beta * tau)
    assert total_variation(completion_logps(tables), optimum).min() > 0.1
    soft = train("sigmoid", once, tables, beta, {"label": torch.sigmoid(gap / tau)})
    assert total_variation(soft, optimum).max() < 1e-5
    distilled = train("distill", once, tables, beta * tau, {"gap": gap})
    assert total_variation(distilled, optimum).max() < 1e-5
    # pairs that are drawn, and with them an incomplete graph of comparisons, change nothing: there is no noise in them
    some = once * (torch.rand(once.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    assert total_variation(train("distill", some, tables, beta * tau, {"gap": gap}), optimum).max() < 1e-5
    # hard labels have no finite minimiser: the policy leaves the optimum for the completion that wins every pair
    assert total_variation(train("sigmoid", once, tables, beta), optimum).max() > 0.5


@pytest.mark.parametrize("name", ["forward-kl", "js", "alpha"])
def test_another_divergence_has_another_optimum(name):
    """beta f'(pi / pi_ref) is the score up to a constant of the prompt (2309.16240, theorem 1)."""
    tables, scores = world(10)
    once, gap = ranked(scores)
    ref, beta = completion_logps(tables), 3.0
    slope = DIVERGENCES[name]
    reached = train("distill", once, tables, beta, {"gap": gap, "slope": slope})
    rest = beta * slope(reached - ref) - scores
    assert (rest - rest.mean(-1, keepdim=True)).abs().max() < 1e-4
    assert total_variation(reached, kl_regularised_optimum(ref, scores, beta)).min() > 1e-3


def rated(name: str, share: Tensor, tables: Tensor, beta: float, **means: float) -> Tensor:
    """Log-probs [PROMPTS, K] of the policy that minimises an unpaired loss; `share` [PROMPTS, K] of them are good."""
    ref, policy = completion_logps(tables), tables.clone().requires_grad_()
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in means.items()}
    zeros, ones = torch.zeros(PROMPTS * K, dtype=torch.float64), torch.ones(PROMPTS * K, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(
        [policy], lr=1.0, max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        p = PairLogps(completion_logps(policy).reshape(-1), zeros, ref.reshape(-1), zeros, ones, ones, **given)
        both = [UNPAIRED_LOSSES[name].loss(replace(p, label=label), beta) for label in (ones, zeros)]
        total = (share.reshape(-1) * both[0] + (1 - share.reshape(-1)) * both[1]).mean()
        total.backward()
        return total

    optimiser.step(closure)
    return completion_logps(policy.detach())


def test_unpaired_bco_reaches_the_odds_of_the_labels():
    """At its minimum c = delta + logit(q) / beta for a share q of good ratings."""
    tables, rewards = world(11)
    ref, beta = completion_logps(tables), 2.0
    optimum = kl_regularised_optimum(ref, rewards, beta)
    log_z = (ref + rewards / beta).logsumexp(-1)
    share = torch.sigmoid(rewards - beta * log_z[:, None])  # shifted by prompt, so that delta = 0 fits all of them
    assert total_variation(ref, optimum).min() > 0.1
    assert total_variation(rated("bco", share, tables, beta, running_mean=0.0), optimum).max() < 1e-5


def test_unpaired_kto_gives_its_mass_to_what_most_ratings_call_good():
    """Its value saturates (2402.01306, section 4.3): completions below a share of 1/2 lose all of their mass."""
    tables, rewards = world(12)
    share = torch.sigmoid(rewards)
    good = share > 0.5
    assert (completion_logps(tables).exp() * good).sum(-1).max() < 0.95
    assert (rated("kto", share, tables, 1.0, batch_mean=0.0).exp() * good).sum(-1).min() > 0.99


def test_robust_dpo_reaches_it_from_flipped_labels():
    """With a known fraction e of labels flipped, robust DPO reaches the optimum and DPO does not."""
    tables, rewards = world(1)
    e, beta = 0.2, 1.0
    p = bradley_terry(rewards)[:, PAIRS[:, 0], PAIRS[:, 1]]
    flipped = (1 - e) * p + e * (1 - p)
    optimum = kl_regularised_optimum(completion_logps(tables), rewards, beta)
    assert total_variation(train("robust", flipped, tables, beta, label_smoothing=e), optimum).max() < 1e-6
    assert total_variation(train("sigmoid", flipped, tables, beta), optimum).min() > 1e-2


def test_dpo_on_sampled_labels_is_off_by_their_noise():
    """Labels drawn once: the distance is what the sample size explains.

    DPO is then maximum likelihood of a Bradley-Terry model over all K completions, whose log-ratios u = log pi/pi_ref
    have the asymptotic covariance F^+ / beta^2, F the Fisher information of the labels (a Laplacian over completions
    with weights n p (1 - p)). With d pi = pi (du - E_pi du), the distance is half of sum pi |du - E_pi du|, whose mean
    is at most half of sum pi sd(du - E_pi du). A prompt may exceed that mean threefold before something is wrong.
    """
    tables, rewards = world(2)
    n, beta = 400, 0.5  # labels of each of the 78 pairs of a prompt
    g = torch.Generator().manual_seed(0)
    p = bradley_terry(rewards)
    upper = torch.triu(torch.ones(K, K, dtype=torch.bool), 1)
    drawn = torch.binomial(torch.full_like(p, n), p, generator=g) * upper
    wins = drawn + ((n - drawn) * upper).transpose(1, 2)
    reached = train("sigmoid", wins[:, PAIRS[:, 0], PAIRS[:, 1]], tables, beta)
    optimum = kl_regularised_optimum(completion_logps(tables), rewards, beta)

    information = -n * p * (1 - p)
    information.diagonal(dim1=1, dim2=2).zero_()
    information.diagonal(dim1=1, dim2=2).copy_(-information.sum(-1))
    covariance = torch.linalg.pinv(information, hermitian=True) / beta**2
    pi = optimum.exp()
    centre = torch.eye(K, dtype=torch.float64) - pi[:, None, :]  # du -> du - E_pi du
    sd = (centre @ covariance @ centre.transpose(1, 2)).diagonal(dim1=1, dim2=2).sqrt()
    expected = 0.5 * (pi * sd).sum(-1)
    distance = total_variation(reached, optimum)
    assert expected.max() < 0.06  # the bound is not an empty one: the reference itself is far away
    assert total_variation(completion_logps(tables), optimum).min() > 0.3
    assert (distance < 3 * expected).all()
    assert (distance > 0.05 * expected).all()  # labels that carry noise cannot lead to the optimum itself


def test_ipo_reaches_the_optimum_of_its_paper():
    """IPO (2310.12036) with pairs drawn uniformly: pi_ref exp(P(y beats a uniform draw) / tau) / Z, ties counting 1/2.

    For each pair p (h - 1/2tau)^2 + (1 - p)(h + 1/2tau)^2 is least at h = (2p - 1)/2tau; with h = u(y) - u(y') the
    least squares over all pairs give u(y) = mean over y' of (2p - 1)/2tau, up to a constant.
    """
    tables, rewards = world(3)
    tau = 0.2
    p = bradley_terry(rewards)
    optimum = kl_regularised_optimum(completion_logps(tables), p.mean(-1), tau)
    assert total_variation(completion_logps(tables), optimum).min() > 0.1
    reached = train("ipo", p[:, PAIRS[:, 0], PAIRS[:, 1]], tables, tau)
    assert total_variation(reached, optimum).max() < 1e-6
    by_token = train("ipo-mean", p[:, PAIRS[:, 0], PAIRS[:, 1]], tables, tau)  # another reading, another objective
    assert total_variation(by_token, optimum).min() > 1e-2


# --- the closed forms themselves -------------------------------------------------------------------------------------


def f64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_optimum_by_hand():
    reference = f64(0.5, 0.5).log()
    # rewards 0 and log 3 at beta 1 give weights 1 and 3; at beta 2, 1 and sqrt 3
    for beta, odds in ((1.0, 3.0), (2.0, math.sqrt(3.0))):
        logps = kl_regularised_optimum(reference, f64(0.0, math.log(3)), beta)
        torch.testing.assert_close(logps.exp(), f64(1, odds) / (1 + odds), rtol=1e-15, atol=0)
    # from .5 to .95 of a reward of 0 and 1 costs 0.95 log 1.9 + 0.05 log 0.1 = 0.60976 - 0.11513 = 0.49463 nats, and is
    # reached at beta = 1 / log 19
    reward, cost = optimal_point(reference, f64(0.0, 1.0), 1 / math.log(19))
    assert reward.item() == pytest.approx(0.95, abs=1e-15)
    assert cost.item() == pytest.approx(0.49463, abs=5e-6)


def test_no_policy_beats_the_optimum():
    """E[r] - beta KL is beta log Z there and less anywhere else, by beta KL(pi || pi*)."""
    tables, rewards = world(4)
    ref, beta = completion_logps(tables), 0.3
    reward, cost = optimal_point(ref, rewards, beta)
    best = beta * (ref + rewards / beta).logsumexp(-1)
    torch.testing.assert_close(reward - beta * cost, best, rtol=1e-13, atol=1e-13)
    other = completion_logps(world(5)[0])
    value = (other.exp() * rewards).sum(-1) - beta * kl(other, ref)
    gap = beta * kl(other, kl_regularised_optimum(ref, rewards, beta))
    torch.testing.assert_close(best - value, gap, rtol=1e-12, atol=1e-13)
    assert gap.min() > 0.1


def test_samples_of_the_reference_estimate_the_optimum():
    """With -log M for log-probs, reward and KL are those of self-normalised weights: r/beta - log mean exp(r/beta)."""
    _, rewards = world(6)
    reference = torch.full((PROMPTS, K), -math.log(K), dtype=torch.float64)
    reward, cost = optimal_point(reference, rewards, 0.5)
    weights = torch.exp(rewards / 0.5)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(reward, (weights * rewards).sum(-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(cost, math.log(K) + (weights * weights.log()).sum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(cost, reward / 0.5 - (rewards / 0.5).exp().mean(-1).log(), rtol=1e-12, atol=0)
    # it goes from the reference itself to log M, where one sample has all the weight
    assert optimal_point(reference, rewards, 1e6)[1].max() < 1e-9
    torch.testing.assert_close(optimal_point(reference, rewards, 1e-4)[1], torch.full_like(cost, math.log(K)))


def test_kl_by_hand():
    p, q = f64([0.5, 0.5], [1.0, 0.0]), f64([0.25, 0.75], [0.5, 0.5])
    # 0.5 log 2 + 0.5 log 2/3 = 0.5 log 4/3 = 0.1438410362; and log 2, the outcome of probability 0 counting nothing
    torch.testing.assert_close(kl(p.log(), q.log()), f64(0.1438410362, 0.6931471806), rtol=0, atol=6e-11)
    assert kl(q.log(), p.log())[1] == math.inf  # the other way round: the policy gives what the reference cannot
    certain = f64(0.0, -math.inf).requires_grad_()
    nothing = kl(certain, certain.detach())
    nothing.backward()
    assert nothing == 0 and certain.grad.isfinite().all()


def test_exact_steps_add_up_to_the_sequence_kl():
    """The exact KL of each step, averaged over the policy's completions, is the sequence KL, with less spread."""
    tables, ref_tables = world(7)[0], world(8)[0]
    policy, ref = completion_logps(tables), completion_logps(ref_tables)
    by_state = kl(steps(tables), steps(ref_tables))  # [PROMPTS, states]
    exact = torch.stack([by_state[:, 0] + (by_state[:, 1 + c[0]] if len(c) == 2 else 0) for c in COMPLETIONS], dim=1)
    log_ratio = policy - ref
    for estimate in (exact, log_ratio):
        torch.testing.assert_close((policy.exp() * estimate).sum(-1), kl(policy, ref), rtol=1e-12, atol=1e-13)
    mean = kl(policy, ref)[:, None]
    spread = [(policy.exp() * (estimate - mean) ** 2).sum(-1) for estimate in (exact, log_ratio)]
    assert (spread[0] < spread[1]).all()


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_best_of_n_kl(n):
    """Best of n, written out: with m equally likely rewards of rank k it has probability (k^n - (k-1)^n) / m^n.

    The bound is the value without ties, so it holds for every m and is met as m grows.
    """
    gaps = []
    for m in (2, 10, 100_000):
        rank = torch.arange(m + 1, dtype=torch.float64) / m
        p = (rank**n).diff()
        gaps.append(best_of_n_kl_bound(n) - kl(p.log(), torch.full_like(p, -math.log(m))).item())
    assert best_of_n_kl_bound(1) == 0
    slack = 1e-10  # sums of up to 100,000 float64 terms
    assert gaps[0] >= gaps[1] - slack and gaps[1] >= gaps[2] - slack and gaps[2] >= -slack
    assert gaps[2] < 1e-5 * n
