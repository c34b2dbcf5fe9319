"""Statistics of win rates: intervals, length control, paired comparison, agreement."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

Z = 1.959963984540054  # two-sided 95 %
_DRAWS = 4000


def wilson(rate: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate over n comparisons (a tie counts as half a win)."""
    return _wilson(rate, n) if n else (0.0, 1.0)


def _wilson(rate: float, n: float) -> tuple[float, float]:
    middle = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by resampling clusters (prompts), since comparisons of one prompt are correlated."""
    sums, counts = by_cluster(values, clusters)
    rng = np.random.Generator(np.random.Philox(key=seed))
    picks = rng.integers(0, len(sums), size=(_DRAWS, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def soft_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of the mean of probabilities that a is better, where those of one prompt may be correlated.

    Wilson's, at the number of verdicts that would be as precise as the probabilities. The mean v of a prompt has mean m
    and variance m (1 - m) f, where f = 1 - E[v (1 - v)] / (m (1 - m)) is 1 for verdicts 0 and 1 and small for a judge
    who is rarely sure; n prompts tell as much as n / f verdicts. In f, m is Wilson's centre, so that 20 probabilities
    near 1 do not exclude a loss that they do not hold, and Student's t makes up for few prompts. The interval is never
    wider than that of as many verdicts, and as wide where all prompts have the same mean: their spread is not known
    then. A prompt weighs as much as it has comparisons.
    """
    sums, counts = by_cluster(values, clusters)
    means, weights = sums / counts, counts / counts.sum()
    n = 1 / float((weights**2).sum())  # prompts; fewer where their weights differ
    rate = float((weights * means).sum())
    if np.ptp(means) == 0:
        return _wilson(rate, n)
    centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    share = 1 - float((weights * means * (1 - means)).sum()) / (centre * (1 - centre))
    share *= (student(n - 1) / Z) ** 2
    return _wilson(rate, n / min(1.0, share))


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, for two-sided 95 %.

    Abramowitz and Stegun 26.7.5; 0.2 % off from 3 degrees of freedom on.
    """
    z, v = Z, max(freedom, 1.0)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))


def reliability(p: Sequence[float], known: Sequence[float], bins: int = 5) -> dict[str, Any]:
    """How probabilities `p` that a is better agree with what is known (1 for a, 0 for b, a tie or even votes 1/2).

    `brier`: the mean of (p - known)^2 (Brier 1950), 0.25 for a judge that always says 1/2. `bins`: [mean confidence,
    agreement, comparisons] of equal bins of the confidence in the preferred one, max(p, 1 - p), from 1/2 to 1; the
    agreement is the share of what is known that is for it. `error`: the mean distance between the two, weighted by
    comparisons (expected calibration error).
    """
    said, true = np.asarray(p, float), np.asarray(known, float)
    confidence = np.maximum(said, 1 - said)
    agree = np.where(said > 0.5, true, np.where(said < 0.5, 1 - true, 0.5))
    places = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for place in np.unique(places):
        of = places == place
        found.append([float(confidence[of].mean()), float(agree[of].mean()), int(of.sum())])
    return {
        "n": len(said),
        "brier": float(((said - true) ** 2).mean()),
        "error": sum(n * abs(c - a) for c, a, n in found) / len(said),
        "bins": found,
    }


def numbered(clusters: Sequence[Hashable]) -> list[int]:
    """The number of each value's cluster, counted from 0 in the order in which they come."""
    names = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    return [names[c] for c in clusters]


def by_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """(the sum of each cluster's values, how many they are)."""
    place = numbered(clusters)
    return np.bincount(place, weights=values), np.bincount(place).astype(float)


def paired_difference(one: Mapping[str, float], other: Mapping[str, float], seed: int = 0) -> dict[str, float]:
    """Difference of two mean scores over the prompts that both have, with a paired bootstrap's 95 % interval.

    `p` is the two-sided bootstrap probability of a difference at least as far from 0. Raises ValueError without a
    common prompt.
    """
    common = [key for key in one if key in other]
    if not common:
        raise ValueError("no common prompts")
    differences = np.array([one[key] - other[key] for key in common])
    rng = np.random.Generator(np.random.Philox(key=seed))
    means = differences[rng.integers(0, len(common), size=(_DRAWS, len(common)))].mean(1)
    below = min(float((means <= 0).mean()), float((means >= 0).mean()))
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(differences.mean())
    return {"difference": mean, "low": float(low), "high": float(high), "p": min(1.0, 2 * below), "n": len(common)}


def length_controlled(scores: Sequence[float], differences: Sequence[float]) -> float | None:
    """Win rate at equal lengths: a logistic model of the score (1, 0, ties 1/2) on the length difference, read at zero.

    A small ridge penalty keeps it finite where lengths separate wins from losses. None for fewer than two comparisons.
    """
    y, x = np.asarray(scores, float), np.asarray(differences, float)
    if len(y) < 2:
        return None
    scale = x.std() or 1.0
    design = np.stack([np.ones_like(x), x / scale], axis=1)
    w = logistic(design, y, np.array([1e-6, 1e-3 * len(y)]))
    return float(1 / (1 + np.exp(-w[0])))


def logistic(design: np.ndarray, y: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Coefficients of a logistic model of y (1, 0, ties 1/2) by Newton's method; `ridge`: the penalty of each, which
    keeps it finite where a covariate separates the outcomes."""
    w, penalty = np.zeros(design.shape[1]), np.diag(ridge)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ w, -30, 30)))
        gradient = design.T @ (y - p) - penalty @ w
        hessian = (design * (p * (1 - p))[:, None]).T @ design + penalty + 1e-9 * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        w = w + np.clip(step, -4, 4)
        if np.abs(step).max() < 1e-10:
            break
    return w


def agreement(one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
    """(raw agreement, Cohen's kappa) of two judges on the same comparisons; kappa is 1 where all verdicts are equal."""
    n = len(one)
    raw = sum(a == b for a, b in zip(one, other, strict=True)) / n
    chance = sum((one.count(v) / n) * (other.count(v) / n) for v in set(one) | set(other))
    return raw, 1.0 if chance == 1 else (raw - chance) / (1 - chance)
