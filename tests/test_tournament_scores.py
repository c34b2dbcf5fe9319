"""Bradley-Terry scores: worked values, an independent fit, intervals that cover, candidates without a finite score."""

import math

import numpy as np
import pytest

from dpoctl.judging import bradley_terry
from dpoctl.judging.bradley_terry import Place, fit, places, wins_of
from dpoctl.judging.tournament_summary import metrics_of
from dpoctl.reports import tournaments


def compared(pairs: dict[tuple[str, str], str], prompts: int = 1) -> list[dict]:
    """Rows of comparisons in one order; `pairs` holds the outcomes of (a, b), one letter each: a, b, or t for a tie."""
    verdicts = {"a": "a", "b": "b", "t": "tie"}
    return [
        {"prompt_id": f"{i} {prompt}", "k": 0, "a": "x", "b": "y", "judge": "m", "verdict": verdicts[letter]}
        | {"a_of": a, "b_of": b}
        for prompt in range(prompts)
        for (a, b), letters in pairs.items()
        for i, letter in enumerate(letters)
    ]


# --- the fit


def test_two_candidates_by_hand():
    """Three wins of four: odds of 3 to 1. A tie is half a win for each: two wins and a tie of four are 2.5 to 1.5."""
    assert np.diff(fit(np.array([[0, 3], [1, 0]]) * 100.0)) == pytest.approx([-math.log(3)], abs=1e-4)
    rows = compared({("A", "B"): "aatb"}, 50)
    found = {s["candidate"]: s for s in metrics_of(rows, ["A", "B"], "B")["scores"]}
    assert found["A"]["score"] == pytest.approx(math.log(2.5 / 1.5), abs=1e-4) and found["B"]["score"] == 0
    assert found["A"]["elo"] == pytest.approx(400 * math.log10(2.5 / 1.5), abs=0.02)
    assert found["A"]["win_over_baseline"] == pytest.approx(0.625, abs=1e-4) and found["A"]["n"] == 200


def test_exact_probabilities_give_the_scores_back():
    """Whom nobody compared directly too: in a chain and a star the differences are those of the pairs."""
    truth = np.array([0.9, 0.2, -0.3, -0.8])
    p = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    for pairs in ([(0, 1), (1, 2), (2, 3)], [(0, 3), (1, 3), (2, 3)], [(i, j) for i in range(4) for j in range(i)]):
        wins = np.zeros((4, 4))
        for i, j in pairs:
            wins[i, j], wins[j, i] = 1e5 * p[i, j], 1e5 * p[j, i]
        assert fit(wins) == pytest.approx(truth, abs=1e-5)


def test_the_fit_is_that_of_minorisation():
    """Hunter 2004, the Annals of Statistics 32: strength i becomes its wins over the sum of games / (i's + j's)."""
    rng = np.random.default_rng(5)
    wins = rng.integers(5, 60, (6, 6)).astype(float)
    np.fill_diagonal(wins, 0)
    strength = np.ones(6)
    for _ in range(3000):
        games = (wins + wins.T) / (strength[:, None] + strength[None, :])
        strength = wins.sum(1) / games.sum(1)
        strength /= np.exp(np.log(strength).mean())
    assert fit(wins) == pytest.approx(np.log(strength), abs=1e-4)


def test_a_batch_is_fitted_as_its_matrices_are():
    rng = np.random.default_rng(6)
    wins = rng.integers(0, 9, (20, 4, 4)).astype(float)
    wins[0] = np.triu(np.full((4, 4), 9.0), 1)  # without a finite maximum
    assert fit(wins) == pytest.approx(np.stack([fit(one) for one in wins]), abs=1e-6)
    assert np.isfinite(fit(wins)).all()


# --- intervals


def simulated(rng, truth, prompts: int, spread: float, samples: int, baseline: int | None) -> np.ndarray:
    """Wins (prompts, m, m) of candidates whose scores differ from prompt to prompt by a normal of this spread."""
    size = len(truth)
    score = truth + rng.normal(0, spread, (prompts, size))
    wins = np.zeros((prompts, size, size))
    for i in range(size):
        for j in range(i + 1, size):
            if baseline is None or baseline in (i, j):
                won = rng.binomial(samples, 1 / (1 + np.exp(score[:, j] - score[:, i])))
                wins[:, i, j], wins[:, j, i] = won, samples - won
    return wins


def limit_of(truth, spread: float, baseline: int | None) -> np.ndarray:
    """The scores of infinitely many prompts: those that fit the mean probabilities."""
    rng = np.random.default_rng(0)
    score = truth + rng.normal(0, spread, (400_000, len(truth)))
    p = np.array([[(1 / (1 + np.exp(score[:, j] - score[:, i]))).mean() for j in range(4)] for i in range(4)])
    np.fill_diagonal(p, 0)
    scores = fit(1e6 * p)
    return scores - (scores.mean() if baseline is None else scores[baseline])


TRUTH = np.array([1.0, 0.3, -0.3, -1.0])


@pytest.mark.parametrize(
    ("prompts", "spread", "samples", "baseline"), [(200, 0.0, 1, 0), (60, 1.5, 2, None)], ids=["alone", "correlated"]
)
def test_intervals_cover(monkeypatch, prompts, spread, samples, baseline):
    """Of 300 tournaments, for each candidate; with prompts that favour a candidate in all its comparisons too."""
    monkeypatch.setattr(bradley_terry, "_DRAWS", 400)
    rng, truth = np.random.default_rng(7), limit_of(TRUTH, spread, baseline)
    covered = {i: [] for i in range(4) if i != baseline}
    for draw in range(300):
        found = places(simulated(rng, TRUTH, prompts, spread, samples, baseline), baseline, seed=draw)
        for i, inside in covered.items():
            inside.append(found[i].low <= truth[i] <= found[i].high)
    shares = [np.mean(inside) for inside in covered.values()]
    assert 0.92 <= np.mean(shares) <= 0.98 and min(shares) > 0.9, shares


def test_resampling_comparisons_instead_of_prompts_would_not_cover(monkeypatch):
    """What the intervals are for: with four samples a prompt, those of single comparisons are too narrow."""
    monkeypatch.setattr(bradley_terry, "_DRAWS", 300)
    rng, truth = np.random.default_rng(8), limit_of(TRUTH, 2.0, None)
    by_prompt, by_comparison = [], []
    for draw in range(60):
        wins = simulated(rng, TRUTH, 60, 2.0, 4, None)
        single = np.concatenate([_alone(wins[:, i, j], i, j) for i in range(4) for j in range(4) if i != j])
        for covered, of in ((by_prompt, wins), (by_comparison, single)):
            covered += [p.low <= t <= p.high for p, t in zip(places(of, None, draw), truth, strict=True)]
    assert np.mean(by_prompt) > 0.9 and np.mean(by_comparison) < 0.85


def _alone(won: np.ndarray, i: int, j: int) -> np.ndarray:
    """(wins, m, m): each win of i over j as if it were of a prompt of its own."""
    alone = np.zeros((int(won.sum()), 4, 4))
    alone[:, i, j] = 1
    return alone


def test_one_prompt_tells_no_interval():
    found = places(wins_of([("p", "A", "B", 1.0), ("p", "A", "B", 0.0), ("p", "A", "B", 1.0)], ["A", "B"]))
    assert found[0].low is None and found[0].score == pytest.approx(math.log(2) / 2, abs=1e-2)


def test_probabilities_are_wins_in_part():
    """Of A over B .8 and .6, their mean .7: odds of 7 to 3, though a verdict would be A's each time."""
    rows = [row | {"p": p} for row, p in zip(compared({("A", "B"): "aa"}, 40), [0.8, 0.6] * 40, strict=True)]
    metrics = metrics_of(rows, ["A", "B"], "B")
    found = {s["candidate"]: s for s in metrics["scores"]}
    assert found["A"]["score"] == pytest.approx(math.log(0.7 / 0.3), abs=1e-3) and metrics["summary"]["soft"]
    assert found["A"]["interval"][0] < math.log(0.7 / 0.3) < found["A"]["interval"][1]


def test_each_criterion_has_its_scores():
    rows = [row | {"criterion": "style"} for row in compared({("A", "B"): "aab"}, 5)]
    rows += [row | {"criterion": "truth"} for row in compared({("A", "B"): "abb"}, 5)]
    found = metrics_of(rows, ["A", "B"], None)["by_criterion"]
    assert {name: of["scores"][0]["candidate"] for name, of in found.items()} == {"style": "A", "truth": "B"}
    assert metrics_of(rows[:15], ["A", "B"], None) == found["style"]


# --- without a finite score


def test_who_wins_or_loses_everything_has_no_finite_score():
    rows = compared({("A", "B"): "aab", ("A", "C"): "aa", ("B", "C"): "aa", ("D", "A"): "aa"}, 20)
    metrics = metrics_of(rows, ["A", "B", "C", "D", "E"], None)
    assert [s["candidate"] for s in metrics["scores"]] == ["D", "A", "B", "C", "E"]
    of = {s["candidate"]: s for s in metrics["scores"]}
    assert [of[name].get("outside") for name in "ABCDE"] == [None, None, "below", "above", "apart"]
    assert of["A"]["score"] == -of["B"]["score"] == pytest.approx(math.log(2) / 2, abs=1e-4)  # the others tell nothing
    assert of["A"]["interval"][0] < math.log(2) / 2 < of["A"]["interval"][1]
    assert all(of[name]["score"] is None and of[name]["interval"] is None for name in "CDE")
    told = tournaments.told(metrics)
    assert [text.partition(":")[0] for text in told] == ["D", "C", "E"]
    shown = {row[0]: row for row in tournaments.scores(metrics).rows}
    assert shown["D"][1] == "+∞" and shown["C"][1] == "−∞" and shown["E"][1] == "–"  # noqa: RUF001


def test_a_baseline_that_loses_everything():
    metrics = metrics_of(compared({("A", "B"): "aa", ("C", "B"): "aa"}, 5), ["A", "B", "C"], "B")
    of = {s["candidate"]: s for s in metrics["scores"]}
    assert of["B"]["score"] == 0 and of["A"]["outside"] == of["C"]["outside"] == "above"
    assert places(np.zeros((0, 2, 2))) == [Place(0.0), Place(None, outside="apart")]


def test_wins_in_a_circle_are_told():
    """Each beats the next with 9 to 1: equal scores, which say 1 to 1."""
    circle = {("A", "B"): "aaaaaaaaab", ("B", "C"): "aaaaaaaaab", ("C", "A"): "aaaaaaaaab"}
    metrics = metrics_of(compared(circle, 10), ["A", "B", "C"], None)
    assert [s["score"] for s in metrics["scores"]] == pytest.approx([0, 0, 0], abs=1e-6)
    told = tournaments.told(metrics)
    assert len(told) == 3 and "the win rate is 0.900, the scores imply 0.500" in told[0]
    in_line = {("A", "B"): "aaab", ("B", "C"): "aaab", ("A", "C"): "aaaaaaaaab"}  # odds of 3, 3 and 9
    assert tournaments.told(metrics_of(compared(in_line, 10), ["A", "B", "C"], None)) == []
    always = compared({("A", "B"): "aaaaaaab", ("B", "C"): "aaaaaaab", ("A", "C"): "aaaaaaaa"}, 4)
    twice = [row | {"k": k} for row in always for k in (0, 1)]  # a bootstrap of A's wins over C has no width
    metrics = metrics_of(twice, ["A", "B", "C"], None)
    won = next(pair for pair in metrics["pairs"] if (pair["a"], pair["b"]) == ("A", "C"))
    assert won["interval"] == [1, 1] and won["implied"] < 0.999 and tournaments.told(metrics) == []
