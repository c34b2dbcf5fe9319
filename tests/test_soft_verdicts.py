"""Win rates from a judge's probabilities: intervals that cover, errors against those of verdicts, ties, calibration.

The simulated judge. Prompt i has a difference s_i ~ N(mu, tau^2) between a and b, in log-odds. Asked in the order AB
the judge says A with probability p_i1 = sigmoid(s_i + delta + e_i1), asked in the order BA it says that a is better
with p_i2 = sigmoid(s_i - delta + e_i2): delta is its bias to the first position, and e ~ N(0, eta^2) its noise, which
differs with the order (the wording, the numbers of a server's batches). A text verdict is drawn with that probability
(temperature 1) or is the more probable side (temperature 0); both orders make a win, a loss, or a tie where they
disagree, as dpoctl counts them. The soft verdict is v_i = (p_i1 + p_i2) / 2.

What is estimated is the win rate m = E[v]: how often the judge prefers a, over prompts, noise and both orders.
Verdicts at temperature 1 and probabilities are unbiased for it. Per prompt the verdicts' score has variance Var(v) +
W, where W = E[p1 (1 - p1) + p2 (1 - p2)] / 4 is the judge's coin, which probabilities do without; so the ratio of the
errors is sqrt(Var(v) / (Var(v) + W)), whatever n is. It is at most 1/2 where Var(v) <= W / 3: for a judge that sees a
small difference in most pairs (tau up to 0.8 around even odds), as between two checkpoints of one run. A judge that is
sure of most pairs (tau = 3) leaves less to gain. At temperature 0 verdicts estimate something else: with a bias that
is larger than the differences all pairs flip, and the win rate is 1/2 whatever the judge sees. For the given prompts
alone, where only the judge's noise is an error, probabilities are better by a larger factor in all of these.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest

from dpoctl.judging import statistics, summary
from dpoctl.judging.pairs import Decision, decision_of

N = 200


class Judge(NamedTuple):
    mu: float
    tau: float
    delta: float
    eta: float

    def differences(self, rng, *size: int) -> np.ndarray:
        return rng.normal(self.mu, self.tau, size)

    def probabilities(self, rng, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = (s + shift + rng.normal(0, self.eta, s.shape) for shift in (self.delta, -self.delta))
        return 1 / (1 + np.exp(-first)), 1 / (1 + np.exp(-second))


class Estimates(NamedTuple):
    """Win rates [R] of R simulated files."""

    soft: np.ndarray
    sampled: np.ndarray
    greedy: np.ndarray


CLOSE = Judge(0.3, 0.7, 0.5, 0.3)  # win rate .56; between two checkpoints
BIASED = Judge(0.4, 0.3, 1.5, 0.1)  # its bias is larger than what it sees
SURE = Judge(0.3, 3.0, 0.5, 0.5)


def estimates(judge: Judge, rng, s: np.ndarray) -> Estimates:
    p1, p2 = judge.probabilities(rng, s)
    sampled = (rng.random(s.shape) < p1).astype(float) + (rng.random(s.shape) < p2)
    greedy = (p1 > 0.5).astype(float) + (p2 > 0.5)
    return Estimates(((p1 + p2) / 2).mean(-1), sampled.mean(-1) / 2, greedy.mean(-1) / 2)


def win_rate(judge: Judge, rng) -> float:
    p1, p2 = judge.probabilities(rng, judge.differences(rng, 2_000_000))
    return float((p1 + p2).mean() / 2)


def errors(found: Estimates, truth: float) -> list[float]:
    return [float(np.sqrt(((rates - truth) ** 2).mean())) for rates in found]


def test_the_error_is_at_most_half_of_that_of_verdicts():
    rng = np.random.default_rng(0)
    for judge in (CLOSE, BIASED):
        soft, sampled, greedy = errors(estimates(judge, rng, judge.differences(rng, 2000, N)), win_rate(judge, rng))
        assert soft <= sampled / 2 and soft <= greedy / 2


def test_the_ratio_of_errors_is_the_one_that_the_variances_give():
    """And it is near 1 for a judge that is sure of most pairs: probabilities are then little more than verdicts."""
    rng = np.random.default_rng(1)
    ratios = []
    for judge in (CLOSE, BIASED, SURE):
        p1, p2 = judge.probabilities(rng, judge.differences(rng, 1_000_000))
        v, coin = ((p1 + p2) / 2).var(), (p1 * (1 - p1) + p2 * (1 - p2)).mean() / 4
        soft, sampled, _ = errors(estimates(judge, rng, judge.differences(rng, 2000, N)), win_rate(judge, rng))
        ratios.append(soft / sampled)
        assert ratios[-1] == pytest.approx(math.sqrt(v / (v + coin)), rel=0.05)
    assert ratios[0] < 0.5 and ratios[1] < 0.25 and ratios[2] > 0.75


@pytest.mark.parametrize("judge", [CLOSE, BIASED, SURE])
def test_for_the_given_prompts_only_the_noise_is_an_error(judge):
    rng = np.random.default_rng(2)
    s = np.repeat(judge.differences(rng, 1, N), 1000, axis=0)
    found = estimates(judge, rng, s)
    soft, sampled, _ = errors(found, float(found.soft.mean()))
    assert soft <= sampled / 4


def test_a_biased_judges_verdicts_at_temperature_0_see_no_difference():
    """All pairs flip, so that the win rate is 1/2; the probabilities tell .55, and their interval excludes 1/2."""
    rng = np.random.default_rng(3)
    s = BIASED.differences(rng, 300, N)
    found = estimates(BIASED, rng, s)
    assert np.abs(found.greedy - 0.5).max() < 0.01
    p1, p2 = BIASED.probabilities(rng, s)
    assert all(statistics.soft_interval(row, range(N))[0] > 0.5 for row in (p1 + p2) / 2)


@pytest.mark.parametrize(
    ("judge", "n"),
    [
        *((judge, n) for judge in (CLOSE, BIASED, SURE) for n in (20, 50, N)),
        (Judge(0.0, 5.0, 0.5, 0.5), N),  # nearly always sure
        (Judge(4.0, 2.0, 0.5, 0.5), N),  # a wins 93 %
        (Judge(5.0, 3.0, 0.0, 0.0), N),  # most probabilities are 1
        (Judge(0.0, 0.3, 0.0, 0.0), N),  # never sure
    ],
)
def test_intervals_cover(judge, n):
    """In 1,000 simulations, whose share has a standard error of 0.7 points."""
    rng = np.random.default_rng(4)
    truth = win_rate(judge, rng)
    p1, p2 = judge.probabilities(rng, judge.differences(rng, 1000, n))
    found = [statistics.soft_interval(row, range(n)) for row in (p1 + p2) / 2]
    covered = np.mean([low <= truth <= high for low, high in found])
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("sizes", [[4] * 50, [1, 2, 3, 10] * 12])
def test_intervals_cover_where_prompts_have_several_comparisons(sizes):
    """Comparisons of one prompt share most of their difference; an interval of them as independent ones covers less."""
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(len(sizes)), sizes)
    truth = win_rate(CLOSE, rng)
    covered, naive = 0, 0
    for _ in range(1000):
        own = rng.normal(0, 0.6, len(sizes))[prompts] + rng.normal(0, math.sqrt(CLOSE.tau**2 - 0.36), len(prompts))
        p1, p2 = CLOSE.probabilities(rng, CLOSE.mu + own)
        low, high = statistics.soft_interval((p1 + p2) / 2, prompts.tolist())
        covered += low <= truth <= high
        low, high = statistics.soft_interval((p1 + p2) / 2, range(len(prompts)))
        naive += low <= truth <= high
    assert 920 <= covered <= 980 and naive < 850


def test_an_interval_of_few_or_equal_values():
    """Verdicts as probabilities have Wilson's interval; one value or many equal ones do not show a spread."""
    verdicts = [1.0] * 81 + [0.0] * 182
    assert statistics.soft_interval(verdicts, range(263)) == pytest.approx(statistics.wilson(81 / 263, 263), abs=0.002)
    for values in ([0.7], [0.7] * 20, [1.0] * 20):
        expected = pytest.approx(statistics.wilson(values[0], len(values)))
        assert statistics.soft_interval(values, range(len(values))) == expected
    few = statistics.soft_interval([0.6, 0.7], "pq")
    assert few[0] < 0.4 and few[1] > 0.85


def test_students_quantiles():
    """Table values of the 97.5 % quantile."""
    for freedom, value in ((2, 4.303), (5, 2.571), (9, 2.262), (30, 2.042), (199, 1.972)):
        assert statistics.student(freedom) == pytest.approx(value, rel=0.01)


# --- rows -----------------------------------------------------------------------------------------------------------


def both(prompt: str, p_ab: float, p_ba: float, **more) -> list[dict]:
    """A judge's rows of one comparison, p in terms of a."""
    row = {"prompt_id": prompt, "k": 0, "a": "x y", "b": "z", "judge": "m"} | more
    return [
        row | {"order": order, "p": p, "verdict": "a" if p > 0.5 else "b"} for order, p in (("AB", p_ab), ("BA", p_ba))
    ]


def test_outcomes_are_of_the_mean_of_both_orders():
    rows = both("p0", 0.9, 0.3) + both("p1", 0.6, 0.49) + both("p2", 0.6, 0.5) + both("p3", 0.1, 0.2)
    assert list(summary.outcomes(rows).values()) == ["a", "tie", "a", "b"]  # .6, .545, .55, .15
    found = summary.summarise(rows)
    assert found["win_rate"] == pytest.approx((0.6 + 0.545 + 0.55 + 0.15) / 4)
    assert (found["wins"], found["ties"], found["losses"], found["flips"]) == (2, 1, 1, 0.75)
    assert summary.by_prompt(rows)["p1"] == pytest.approx(0.545)


def test_an_order_without_a_probability_and_other_judges():
    """One invalid order makes the comparison invalid; a verdict without a probability counts as one of its kind."""
    rows = both("p0", 0.9, 0.7)
    rows[1] = {k: v for k, v in rows[1].items() if k != "p"} | {"verdict": "invalid", "reason": "x"}
    assert summary.outcomes(rows)[("p0", 0, None, None, None)] == "invalid" and not summary.scores_of(rows)
    person = {"prompt_id": "p1", "k": 0, "a": "x", "b": "y", "judge": "human:Ada", "verdict": "b"}
    assert list(summary.scores_of([*both("p1", 0.9, 0.7), person]).values()) == [pytest.approx(0.4)]


def test_the_summary_of_verdicts_has_no_new_fields():
    row = {"prompt_id": "p", "k": 0, "a": "x", "b": "y", "verdict": "a"}
    assert not {"soft", "sure"} & set(summary.summarise([row]))


def test_reliability_by_hand():
    """.9, .9 and .1 are sure: two of three agree; .6 has a tie. Brier (.01 + .81 + .01 + .01) / 4."""
    found = statistics.reliability([0.9, 0.9, 0.1, 0.6], [1, 0, 0, 0.5])
    assert found["n"] == 4 and found["brier"] == pytest.approx(0.21)
    assert found["bins"] == [[pytest.approx(0.6), 0.5, 1], [pytest.approx(0.9), pytest.approx(2 / 3), 3]]
    assert found["error"] == pytest.approx((0.1 * 1 + (0.9 - 2 / 3) * 3) / 4)


def test_a_calibrated_judge_and_one_that_is_too_sure():
    rng = np.random.default_rng(6)
    log_odds = rng.normal(0.2, 1.2, 20_000)
    p = 1 / (1 + np.exp(-log_odds))
    people = (rng.random(len(p)) < p).astype(float)
    assert statistics.reliability(p, people)["error"] < 0.01
    too_sure = statistics.reliability(1 / (1 + np.exp(-3 * log_odds)), people)
    assert too_sure["error"] > 0.1 and all(confidence > share for confidence, share, _ in too_sure["bins"])
    assert too_sure["brier"] > statistics.reliability(p, people)["brier"]


def test_calibration_is_against_the_mean_of_peoples_votes():
    rows = both("p0", 0.9, 0.7) + both("p1", 0.2, 0.2)
    votes = [("p0", "Ada", "a"), ("p0", "Ben", "b"), ("p1", "Ada", "b"), ("p2", "Ada", "a")]
    people = [{"prompt_id": p, "k": 0, "judge": f"human:{name}", "verdict": v} for p, name, v in votes]
    found = summary.calibration(rows, people)
    assert found["n"] == 2 and found["brier"] == pytest.approx((0.3**2 + 0.2**2) / 2)
    assert summary.calibration(rows, people[3:]) is None


def test_pairs_take_probabilities_as_shares():
    assert decision_of([0.8]) == Decision(0.8, 1) and decision_of([0.53]) == Decision(0.5, 1)
    assert decision_of([0.8, "b", "invalid"]) == Decision(pytest.approx(0.4), 2)
    assert summary.turned({"verdict": "a", "p": 0.8}) == {"verdict": "b", "p": pytest.approx(0.2)}
