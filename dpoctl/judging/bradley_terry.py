"""Bradley-Terry scores of candidates that were compared in pairs, with bootstrap intervals over prompts.

The probability that i beats j is the logistic function of their scores' difference (Bradley and Terry 1952, Biometrika
39); a tie counts as half a win for each.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .statistics import student

_DRAWS = 2000
_RIDGE = 1e-3  # a resample in which a candidate wins everything gets a large score in place of an infinite one
_LONGEST_STEP = 2.0  # of a score in one Newton step
_AT_ONCE = 4_000_000  # prompts times draws that are held at the same time
ELO = 400 / math.log(10)  # points of Elo's scale for one unit of a score

ABOVE, BELOW, APART = "above", "below", "apart"


class Place(NamedTuple):
    """A candidate's score in log-odds with its 95 % interval.

    `outside`: why there is no finite score, and "" where there is one. "above": the candidate, or those that it loses
    to, won every comparison with those that have scores; "below": lost every one; "apart": nothing compares them.
    """

    score: float | None
    low: float | None = None
    high: float | None = None
    outside: str = ""


def places(wins: np.ndarray, baseline: int | None = None, seed: int = 0) -> list[Place]:
    """The score of each candidate by maximum likelihood: the baseline's is 0, or without one their mean is 0.

    `wins`: (prompts, m, m), how often i beat j with a prompt. The interval is the percentile bootstrap over prompts,
    since comparisons of one prompt are correlated; its levels are those of Student's t (Hesterberg 2015, The American
    Statistician 69), without which it is too narrow for few prompts. Candidates without a finite score are left out.
    """
    total = wins.sum(0)
    core, outside = _core(total, baseline)
    found = [Place(None, outside=why) for why in outside]
    inner = wins[:, core][:, :, core]
    used = inner[inner.sum((1, 2)) > 0]
    origin = core.index(baseline) if baseline is not None else None
    scores = _centred(fit(used.sum(0)), origin)
    for i, score in zip(core, scores, strict=True):
        found[i] = Place(float(score))
    if len(used) > 1:  # with one prompt nothing tells how much prompts differ
        bounds = zip(*_interval(_centred(_resampled(used, seed), origin), len(used)), strict=True)
        for i, (low, high) in zip(core, bounds, strict=True):
            found[i] = found[i] if i == baseline else found[i]._replace(low=float(low), high=float(high))
    return found


def fit(wins: np.ndarray) -> np.ndarray:
    """Scores (..., m) with mean 0 that maximise the likelihood of each matrix of wins (..., m, m), by Newton steps.

    A tiny ridge penalty keeps them finite.
    """
    games = wins + wins.swapaxes(-1, -2)
    size = wins.shape[-1]
    scores = np.zeros(wins.shape[:-1])
    for _ in range(100):
        p = probability(scores[..., :, None] - scores[..., None, :])
        gradient = (wins - games * p).sum(-1) - _RIDGE * scores
        weights = games * p * (1 - p)
        diagonal = (weights.sum(-1) + _RIDGE)[..., None] * np.eye(size)
        step = np.linalg.solve(diagonal - weights, gradient[..., None])[..., 0]
        longest = np.abs(step).max(-1, keepdims=True, initial=0)
        scores = scores + step * np.minimum(1, _LONGEST_STEP / np.maximum(longest, _LONGEST_STEP))
        if longest.max(initial=0) < 1e-9:
            break
    return scores


def probability(difference: np.ndarray) -> np.ndarray:
    """The probability to win at a difference of scores."""
    return 1 / (1 + np.exp(-difference))


def _centred(scores: np.ndarray, origin: int | None) -> np.ndarray:
    """Scores (..., m) relative to that of `origin`, or to their mean."""
    return scores - (scores.mean(-1, keepdims=True) if origin is None else scores[..., origin : origin + 1])


def _resampled(wins: np.ndarray, seed: int) -> np.ndarray:
    """Scores (draws, m) of bootstrap samples of the prompts."""
    prompts, size = len(wins), wins.shape[-1]
    flat = wins.reshape(prompts, size * size)
    rng = np.random.Generator(np.random.Philox(key=seed))
    chunk = max(1, _AT_ONCE // max(1, prompts))
    drawn = []
    for start in range(0, _DRAWS, chunk):
        rows = min(chunk, _DRAWS - start)
        picks = rng.integers(0, prompts, size=(rows, prompts)) + np.arange(rows)[:, None] * prompts
        drawn.append(np.bincount(picks.ravel(), minlength=rows * prompts).reshape(rows, prompts) @ flat)
    return fit(np.concatenate(drawn).reshape(_DRAWS, size, size))


def _interval(draws: np.ndarray, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of each score from its draws (draws, m), by quantiles at the levels for two prompts or more."""
    level = 0.5 * math.erfc(math.sqrt(prompts / (prompts - 1)) * student(prompts - 1) / math.sqrt(2))
    low, high = np.quantile(draws, [level, 1 - level], axis=0)
    return low, high


# --- which candidates have finite scores -----------------------------------------------------------------------------


def _core(total: np.ndarray, baseline: int | None) -> tuple[list[int], list[str]]:
    """(the candidates that have finite scores, why each other one has none).

    Scores are finite within a set of candidates where each won, directly or through others, against each other one
    (Ford 1957, The American Mathematical Monthly 64): the baseline's set, or else the largest.
    """
    beats = _reach(total > 0)
    sets = [[j for j in range(len(total)) if beats[i, j] and beats[j, i]] for i in range(len(total))]
    core = sets[baseline] if baseline is not None else max(sets, key=len)
    of = core[0]
    why = ["" if i in core else ABOVE if beats[i, of] else BELOW if beats[of, i] else APART for i in range(len(total))]
    return core, why


def _reach(beats: np.ndarray) -> np.ndarray:
    """(m, m): whether a chain of wins leads from i to j."""
    reach = beats | np.eye(len(beats), dtype=bool)
    for _ in range(max(1, len(beats)).bit_length()):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return reach


def wins_of(scored: Sequence[tuple[str, str, str, float]], names: Sequence[str]) -> np.ndarray:
    """(prompts, m, m): the wins of each candidate over each other one with each prompt.

    `scored`: (prompt, a, b, score of a) of each comparison.
    """
    place = {name: i for i, name in enumerate(names)}
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, *_ in scored))}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for prompt, a, b, score in scored:
        wins[prompts[prompt], place[a], place[b]] += score
        wins[prompts[prompt], place[b], place[a]] += 1 - score
    return wins
