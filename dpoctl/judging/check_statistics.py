"""Statistics of `judge --check`: estimates and tests over verdicts of which those of one prompt belong together.

Tests flip the signs of whole prompts, which is exact where the verdicts of a prompt are as likely to be the other way
round, at any number of prompts; of regressions it is the wild bootstrap of the score (Kline and Santos 2012). Intervals
use the variance over prompts.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .power import smallest_effect
from .statistics import Z, by_cluster, logistic, numbered, wilson

_DRAWS = 4000
_TABLES = 2000  # of a bootstrap of kappa
_EXACT = 12  # prompts up to which all signs are tried
_RIDGE = 1e-3  # per row, on standardised covariates: coefficients stay finite where truth separates the verdicts


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and standard error.

    `p` is that of the test that it is 0, and `p_least` the smallest that so few clusters can have.
    """

    value: float
    low: float
    high: float
    error: float
    p: float
    p_least: float


def share(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float, float]:
    """(mean, low, high) of values from 0 to 1: Wilson's interval at the effective number of values.

    That number is what values that are independent would need for the variance over clusters; with all values 0, or
    all 1, it is the number of clusters. Raises ZeroDivisionError without values.
    """
    mean, (sums, counts) = sum(values) / len(values), by_cluster(values, clusters)
    variance = _variance(sums - mean * counts, len(values))
    spread = mean * (1 - mean)
    effective = len(sums) if variance == 0 or spread == 0 else min(spread / variance, len(values))
    low, high = wilson(mean, effective)
    return mean, low, high


def balance(values: Sequence[float], clusters: Sequence[Hashable], seed: int, one_sided: bool = False) -> Estimate:
    """The mean of values from -1 to 1, such as the difference of two shares over the same comparisons.

    Half a cluster of 1 and half a one of -1 are added (Agresti and Min 2005), so that an interval is not empty where
    all values are 0. `one_sided`: the test is against a mean above 0. Raises ZeroDivisionError without values.
    """
    mean, (sums, counts) = sum(values) / len(values), by_cluster(values, clusters)
    size = len(values) / len(sums)
    n = len(values) + 2 * size
    middle = sum(values) / n
    residuals = np.concatenate([sums - middle * counts, [size * (side * math.sqrt(0.5) - middle) for side in (1, -1)]])
    error = math.sqrt(_variance(residuals, n))
    p, p_least = sign_flips(sums, seed, one_sided), 2.0 ** ((0 if one_sided else 1) - len(sums))
    return Estimate(mean, max(-1.0, middle - Z * error), min(1.0, middle + Z * error), error, p, p_least)


def sign_flips(sums: np.ndarray, seed: int, one_sided: bool = False, observed: float | None = None) -> float:
    """The share of all ways to flip the signs of the clusters' sums with a total at least as far from 0 as the
    `observed` one, by default that of the sums; with `one_sided` at least as large.

    Of all ways where clusters are few, else of random ones and the one observed.
    """
    observed = float(sums.sum()) if observed is None else observed
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    if len(sums) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
        extra = 0
    else:
        bits = np.random.Generator(np.random.Philox(key=seed)).integers(0, 2, (_DRAWS, len(sums)), dtype=np.int8)
        signs, extra = 1 - 2 * bits, 1
    totals = signs @ sums
    tolerance = 1e-9 * np.abs(sums).sum()
    extreme = totals >= observed - tolerance if one_sided else np.abs(totals) >= abs(observed) - tolerance
    return (int(extreme.sum()) + extra) / (len(totals) + extra)


def controlled(
    outcomes: Sequence[float],
    covariate: Sequence[float],
    others: Sequence[Sequence[float]],
    clusters: Sequence[Hashable],
    seed: int,
) -> tuple[Estimate, float]:
    """(coefficient, points) of a covariate in a logistic model of outcomes (1, 0, ties 1/2) with an intercept and
    `others`, each one number a row.

    `points`: by how much, in shares, a rise of the covariate by one changes the outcome, averaged over the rows; an
    interval of the coefficient is scaled by the same factor. The test of the coefficient is that of the score at the
    model without it, which holds where the others separate the outcomes.
    """
    y, x = np.asarray(outcomes, float), np.asarray(covariate, float)
    null = np.stack([np.ones_like(y), *(np.asarray(o, float) for o in others if np.ptp(o) > 0)], axis=1)
    names = numbered(clusters)
    p = _sigmoid(null @ logistic(null, y, _ridge(null)))
    weighted = null * (p * (1 - p))[:, None]
    explained = np.linalg.lstsq(weighted.T @ null + 1e-12 * np.eye(null.shape[1]), weighted.T @ x, rcond=None)[0]
    scores = np.bincount(names, weights=(x - null @ explained) * (y - p))
    test = sign_flips(scores / _shrinkage(null, p, names), seed, observed=float(scores.sum()))

    design = np.column_stack([null, x])
    coefficients = logistic(design, y, _ridge(design))
    p = _sigmoid(design @ coefficients)
    inverse = np.linalg.inv((design * (p * (1 - p))[:, None]).T @ design + np.diag(_ridge(design)))
    parts = np.stack([np.bincount(names, weights=column) for column in (design * (y - p)[:, None]).T])
    parts = parts / _shrinkage(design, p, names)
    groups = parts.shape[1]
    covariance = inverse @ (parts @ parts.T) @ inverse * groups / max(1, groups - 1)
    value, error = float(coefficients[-1]), math.sqrt(max(0.0, float(covariance[-1, -1])))
    found = Estimate(value, value - Z * error, value + Z * error, error, test, 2.0 ** (1 - groups))
    return found, float((p * (1 - p)).mean())


def kappa(
    one: Sequence[str], other: Sequence[str], clusters: Sequence[Hashable], seed: int
) -> tuple[float, float, float]:
    """(Cohen's kappa of two judges, low, high), the interval by a bootstrap over clusters.

    1 where all answers are equal, 0 where agreement by chance cannot be told from agreement. Raises ZeroDivisionError
    without answers.
    """
    answers = sorted({*one, *other})
    names = numbered(clusters)
    cell = [answers.index(a) * len(answers) + answers.index(b) for a, b in zip(one, other, strict=True)]
    counts = np.zeros((max(names) + 1, len(answers) ** 2))
    np.add.at(counts, (names, cell), 1)
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=_TABLES) @ counts
    low, high = np.quantile(_kappas(drawn), [0.025, 0.975])
    return float(_kappas(counts.sum(0)[None])[0]), float(low), float(high)


def _kappas(counts: np.ndarray) -> np.ndarray:
    size = math.isqrt(counts.shape[1])
    tables = counts.reshape(-1, size, size) / counts.sum(1)[:, None, None]
    raw = np.trace(tables, axis1=1, axis2=2)
    chance = (tables.sum(1) * tables.sum(2)).sum(1)
    return np.where(chance > 1 - 1e-12, (raw > 1 - 1e-12).astype(float), (raw - chance) / np.maximum(1 - chance, 1e-12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): those below 0.05 are found, with a chance of at most 5 % of a false one."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def can_find(error: float, tests: int) -> float:
    """The effect that an estimate with this standard error finds with 80 % power at Holm's strictest level."""
    return smallest_effect(error, level=0.05 / tests)


# --- clusters and logistic models


def _variance(residuals: np.ndarray, n: float) -> float:
    """Of a mean of n values, from each cluster's sum of their distances to it."""
    groups = len(residuals)
    return float((residuals**2).sum()) / n**2 * groups / max(1, groups - 1)


def _shrinkage(design: np.ndarray, p: np.ndarray, names: Sequence[int]) -> np.ndarray:
    """By how much the residuals of each cluster are too small, since the model was fitted to them: sqrt(1 - h).

    h is the leverage of the cluster's rows (HC2 of MacKinnon and White 1985).
    """
    weighted = design * (p * (1 - p))[:, None]
    inverse = np.linalg.pinv(weighted.T @ design + 1e-9 * np.eye(design.shape[1]))
    leverage = np.bincount(names, weights=((weighted @ inverse) * design).sum(1))
    return np.sqrt(1 - np.clip(leverage, 0, 0.75))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(z, -30, 30)))


def _ridge(design: np.ndarray) -> np.ndarray:
    """A small penalty of each coefficient, none of the intercept."""
    return np.array([1e-9] + [_RIDGE * len(design)] * (design.shape[1] - 1))
