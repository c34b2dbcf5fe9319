"""Statistics of win rates: worked values of the literature, planted effects, votes and orders."""

import math

import numpy as np
import pytest

from dpoctl.judging import statistics
from dpoctl.judging.summary import outcomes, summarise


def test_wilson_by_hand():
    """Newcombe 1998, table I: 81 of 263 and 15 of 148."""
    assert statistics.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert statistics.wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert statistics.wilson(0.0, 20)[0] == 0.0


def test_the_bootstrap_resamples_prompts():
    rng = np.random.default_rng(0)
    prompts = [i // 10 for i in range(400)]
    values = np.repeat(rng.integers(0, 2, 40), 10).astype(float)
    low, high = statistics.bootstrap(values, prompts)
    expected = 2 * 1.96 * values.std() / math.sqrt(40)
    assert high - low == pytest.approx(expected, rel=0.15)


def test_cohens_kappa_by_hand():
    """Both yes 20, both no 15, 5 and 10 apart, of 50: raw .7, chance .5, kappa .4."""
    one = ["a"] * 20 + ["a"] * 5 + ["b"] * 10 + ["b"] * 15
    other = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    assert statistics.agreement(one, other) == (pytest.approx(0.7), pytest.approx(0.4))


def test_length_control_recovers_a_planted_bias():
    """Wins drawn from a logistic model with a win rate of .4 at equal length and a strong taste for length."""
    rng = np.random.default_rng(1)
    differences = rng.normal(20, 15, 4000)
    p = 1 / (1 + np.exp(-(math.log(0.4 / 0.6) + 0.08 * differences)))
    wins = (rng.random(4000) < p).astype(float)
    assert wins.mean() > 0.65
    assert statistics.length_controlled(wins, differences) == pytest.approx(0.4, abs=0.04)


def test_a_paired_comparison_is_sharper_than_two_intervals():
    rng = np.random.default_rng(2)
    base = rng.integers(0, 2, 300).astype(float)
    one = {i: v for i, v in enumerate(base)}
    other = {i: (v if i % 15 else 0.0) for i, v in enumerate(base)}
    result = statistics.paired_difference(one, other)
    assert result["difference"] > 0 and result["low"] > 0 and result["p"] < 0.05 and result["n"] == 300


def test_a_win_counts_only_where_both_orders_agree():
    def rows(*verdicts):
        return [{"prompt_id": "p", "k": 0, "verdict": v, "a": "x y", "b": "z"} for v in verdicts]

    for verdicts, expected in (
        (("a", "a"), "a"),
        (("a", "b"), "tie"),
        (("b", "b"), "b"),
        (("a", "invalid"), "invalid"),
        (("tie", "tie"), "tie"),
    ):
        assert outcomes(rows(*verdicts)) == {("p", 0, None, None, None): expected}
    found = summarise(rows("a", "b"))
    two = rows("a", "b") + [r | {"judge": "human:2"} for r in rows("a")]
    assert outcomes(two) == {("p", 0, None, None, None): "a"}  # a tie and a vote for a
    people = [r | {"judge": f"human:{i}"} for i, r in enumerate(rows("a", "b", "b", "invalid"))]
    assert outcomes(people) == {("p", 0, None, None, None): "b"} and summarise(people[:2])["ties"] == 1
    assert summarise(people)["flips"] is None  # two people who disagree are no two orders
    assert found["flips"] == 1.0 and found["ties"] == 1 and (found["length_a"], found["length_b"]) == (2, 1)
    assert summarise(rows("invalid"))["win_rate"] is None
