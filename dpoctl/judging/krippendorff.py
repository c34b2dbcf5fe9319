"""Krippendorff's alpha: the agreement of any number of judges, each of whom may have judged a part of the comparisons.

Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011); the notation is the paper's: o is the matrix of
coincidences, n_c are its row sums, delta the squared difference of two values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Level = Literal["nominal", "ordinal", "interval"]

_VERDICTS = {"a": -1.0, "tie": 0.0, "b": 1.0}
_DRAWS = 2000


def alpha(units: Sequence[Sequence[float]], level: Level = "nominal") -> float | None:
    """1 - D_o / D_e over the units (comparisons), each with the values that its judges gave.

    Units with fewer than two values hold no pair and do not count. 1 is perfect agreement, 0 that of values dealt at
    random. None where there is no pair, and where all values are equal: then it is not defined.
    """
    coincidences, values = _coincidences(units)
    return _alpha(coincidences.sum(0), values, level)


def of_judges(verdicts: Sequence[Mapping[Any, str]], seed: int = 0) -> dict[str, Any] | None:
    """Alpha of judges' verdicts (comparison -> a, b, tie or invalid), for metrics; None without a common comparison.

    `nominal`: verdicts agree or do not. `ordinal`: a < tie < b, so that a tie is closer to a win than a loss is.
    `interval`: of the nominal one, 95 %, by resampling the comparisons. `n`: the comparisons that two or more judged.
    """
    found: dict[Any, list[float]] = {}
    for of_judge in verdicts:
        for key, verdict in of_judge.items():
            if verdict in _VERDICTS:
                found.setdefault(key, []).append(_VERDICTS[verdict])
    units = [unit for unit in found.values() if len(unit) > 1]
    if not units:
        return None
    coincidences, values = _coincidences(units)
    total = coincidences.sum(0)
    shown: dict[str, Any] = {level: _alpha(total, values, level) for level in ("nominal", "ordinal")}
    rng = np.random.Generator(np.random.Philox(key=seed))
    picks = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=_DRAWS)
    drawn = [_alpha(one, values, "nominal") for one in np.tensordot(picks, coincidences, 1)]
    defined = [one for one in drawn if one is not None]
    interval = [float(np.quantile(defined, q)) for q in (0.025, 0.975)] if shown["nominal"] is not None else None
    return shown | {"interval": interval, "n": len(units), "judges": len(verdicts)}


def _coincidences(units: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """([units, values, values] coincidences of each unit, the values in rising order)."""
    kept = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in kept for value in unit})
    place = {value: i for i, value in enumerate(values)}
    counts = np.zeros((len(kept), len(values)))
    for row, unit in zip(counts, kept, strict=True):
        for value in unit:
            row[place[value]] += 1
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs -= np.eye(len(values)) * counts[:, :, None]  # a value makes no pair with itself
    return pairs / (counts.sum(1) - 1)[:, None, None], np.array(values)


def _alpha(o: np.ndarray, values: np.ndarray, level: Level) -> float | None:
    n_c = o.sum(1)
    n = n_c.sum()
    delta = _delta(n_c, values, level)
    expected = (np.outer(n_c, n_c) * delta).sum()
    return None if expected == 0 else float(1 - (n - 1) * (o * delta).sum() / expected)


def _delta(n_c: np.ndarray, values: np.ndarray, level: Level) -> np.ndarray:
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        return (values[:, None] - values[None, :]) ** 2
    ranks = np.cumsum(n_c) - n_c / 2  # the values between two, and half of each
    return (ranks[:, None] - ranks[None, :]) ** 2
