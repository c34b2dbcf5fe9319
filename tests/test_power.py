"""How many comparisons tell which difference: against simulations, and the tables of the documentation."""

import json
import math
import re

import numpy as np
import pytest

from dpoctl.cli.app import run
from dpoctl.judging import power
from dpoctl.judging.check_statistics import can_find
from dpoctl.judging.statistics import wilson
from dpoctl.judging.summary import summarise
from helpers.chain import ROOT
from helpers.checked_judges import asked, preferences
from helpers.judging import candidates

PAGE = (ROOT / "dpoctl" / "docs" / "judges.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[float]]:
    """The numbers of the page's table whose head begins with a cell."""
    text = PAGE[PAGE.index(f"| {first} |") :].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return [[float(cell.replace(",", "")) for cell in row] for row in rows]


# --- the functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [50, 200, 5000])
def test_the_half_width_is_that_of_the_interval_of_a_summary(n):
    low, high = wilson(0.5, n)
    assert power.half_width(n) == pytest.approx((high - low) / 2)


def test_a_detectable_difference_by_hand():
    """n = 200: 1.96 * 0.5 / sqrt(200) = 0.0693, and 0.84 deviations of sqrt((1/4 - d^2)/200) at d = 0.0985."""
    d = power.detectable(200)
    assert d == pytest.approx(1.959964 * 0.5 / math.sqrt(200) + 0.841621 * math.sqrt((0.25 - d**2) / 200), rel=1e-6)
    assert d == pytest.approx(0.0985, abs=1e-4)
    assert power.detectable(3) == 0.5 > power.detectable(4)  # three comparisons show nothing, four that all are won do
    assert power.detectable(200, ties=1.0) == 0.5
    assert power.detectable(500, ties=0.4) < power.detectable(500)
    assert power.smallest_effect(0.1) == pytest.approx(0.2802, abs=1e-4)


@pytest.mark.parametrize(("n", "ties"), [(100, 0.0), (500, 0.0), (500, 0.3), (2000, 0.3), (10_000, 0.0)])
def test_the_interval_of_a_simulated_win_rate_excludes_a_half_four_times_out_of_five(n, ties):
    """What is simulated are wins, ties and losses; what decides is Wilson's interval. A win rate of 1/2 is excluded in
    one of twenty."""
    rng, d = np.random.default_rng(n), power.detectable(n, ties)
    for difference, low, high in ((d, 0.77, 0.83), (0.0, 0.005 if ties else 0.035, 0.065)):
        shares = [(1 - ties) / 2 + difference, ties, (1 - ties) / 2 - difference]
        wins, tied, _ = rng.multinomial(n, shares, size=8000).T
        rates, counts = np.unique((wins + tied / 2) / n, return_counts=True)
        excluded = [not (interval := wilson(rate, n))[0] <= 0.5 <= interval[1] for rate in rates]
        assert low <= counts[excluded].sum() / 8000 <= high


def test_the_summary_of_simulated_judgements_finds_the_difference():
    """The same with rows and `summarise`: both orders, of which a win needs both."""
    n, hits, rng = 100, 0, np.random.default_rng(0)
    rate = 0.5 + power.detectable(n)
    for _ in range(200):
        verdicts = np.where(rng.random(n) < rate, "a", "b")
        rows = [
            {"prompt_id": str(i), "k": 0, "a": "x", "b": "y", "order": order, "verdict": str(verdict)}
            for i, verdict in enumerate(verdicts)
            for order in ("AB", "BA")
        ]
        hits += summarise(rows)["interval"][0] > 0.5
    assert 0.72 <= hits / 200 <= 0.88


# --- the page --------------------------------------------------------------------------------------------------------


def dollars(tokens: tuple[int, int], prices: tuple[float, float]) -> float:
    """Of one judgement; prices are of a million tokens."""
    return sum(count * price for count, price in zip(tokens, prices, strict=True)) / 1e6


def test_the_table_for_n_is_what_the_functions_say():
    rows = table("n")
    assert [row[0] for row in rows] == [50, 100, 200, 500, 1000, 2000, 5000, 10_000]
    tokens, prices = (600, 100), (0.25, 2)
    assert all(
        f"{count} {what} tokens" in " ".join(PAGE.split())
        for count, what in zip(tokens, ("prompt", "completion"), strict=True)
    )
    for n, width, difference, with_ties, one, both, batch in rows:
        n = int(n)
        assert 100 * power.half_width(n) == pytest.approx(width, abs=0.051)
        assert 100 * power.detectable(n) == pytest.approx(difference, abs=0.051)
        assert 100 * power.detectable(n, ties=0.3) == pytest.approx(with_ties, abs=0.051)
        for shown, judgements in ((one, n), (both, 2 * n), (batch, n)):  # a batch at half the price
            assert judgements * dollars(tokens, prices) == pytest.approx(shown, abs=0.0051 if n > 200 else 0.00051)
    assert round(dollars(tokens, (2.5, 10)) / dollars(tokens, prices)) == int(
        re.search(r"they are (\d+) times as much", PAGE)[1]
    )


def test_the_table_of_position_biases_is_what_a_simulation_finds():
    """A judge that flips one pair in five, tested at Holm's strictest level of eight tests."""
    for n, points in table("known pairs"):
        assert 100 * can_find(math.sqrt(0.2 / n) / 2, 8) == pytest.approx(points, abs=0.051)
    n, points = 200, dict(map(tuple, table("known pairs")))[200.0]
    rng, excess = np.random.default_rng(0), 2 * points / 100  # of flips to the first answer over those to the second
    first, second, _ = rng.multinomial(n, [(0.2 + excess) / 2, (0.2 - excess) / 2, 0.8], size=4000).T
    sides = np.maximum(first, second)
    level = 0.05 / 8
    tails = {
        (s, t): 2 * sum(math.comb(t, i) for i in range(s, t + 1)) / 2**t
        for s, t in set(zip(sides, first + second, strict=True))
    }
    hits = np.mean([tails[s, t] <= level for s, t in zip(sides, first + second, strict=True)])
    assert 0.72 <= hits <= 0.86  # the exact test of a count is a little stricter than its level


def test_the_number_of_judgements_of_a_check_is_what_the_page_says(tmp_path):
    comparisons = asked(preferences(tmp_path / "known.jsonl", 200, 0))
    assert sum(len(c.orders) for c in comparisons) == 1600 and "200 pairs of 200 prompts are 1,600 judgements" in PAGE


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(folder, capsys, *more: str) -> dict:
    args = ["judge", "a.jsonl", "b.jsonl", "--model", "m", "--base-url", "http://localhost:9/v1", "--out", "j.jsonl"]
    assert run([*args, "--dry-run", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_tells_the_difference_that_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidates(tmp_path, 200)
    name = "difference found (80% power at 5%)"
    assert plan(tmp_path, capsys)[name] == "win rate 9.8 points from 50 %"
    assert plan(tmp_path, capsys, "--limit", "50")[name] == "win rate 19.3 points from 50 %"
    assert plan(tmp_path, capsys, "--limit", "3")[name] == "none: too few comparisons"
    assert plan(tmp_path, capsys, "--canary", "x")[name] == "win rate 9.8 points from 50 %"
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for file in ("a", "b"):
        again = [row | {"k": k, "completion": f"{file} {k}"} for row in rows[:50] for k in range(4)]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again))
    assert plan(tmp_path, capsys)[name] == "win rate 9.8 to 19.3 points from 50 %"
