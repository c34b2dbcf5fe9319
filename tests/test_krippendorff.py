"""Krippendorff's alpha: worked values of the literature, its definition over pairs, judges with overlapping shares."""

from itertools import permutations

import numpy as np
import pytest

from dpoctl.judging.krippendorff import alpha, of_judges

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": A two observers of binary data, B of nominal data,
# C four observers who left values out; and three coders with few common units, a worked example found in encyclopaedias
BINARY = ("0100000000", "1110010010")
NOMINAL = ("aabbdcccedda", "babbbccceddd")
FOUR = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
THREE = (".....34121133.3", "1.213343.......", "..21344.21133.4")


def units(*observers: str) -> list[list[float]]:
    return [[float(ord(v)) for v in column if v != "."] for column in zip(*observers, strict=True)]


@pytest.mark.parametrize(
    ("observers", "level", "expected"),
    [
        (BINARY, "nominal", 0.095),
        (NOMINAL, "nominal", 0.692),
        (FOUR, "nominal", 0.743),
        (FOUR, "ordinal", 0.815),
        (FOUR, "interval", 0.849),
        (THREE, "nominal", 0.691),
        (THREE, "interval", 0.811),
    ],
)
def test_worked_values_of_the_literature(observers, level, expected):
    assert alpha(units(*observers), level) == pytest.approx(expected, abs=6e-4)


def test_the_coefficient_is_that_of_its_definition_over_pairs():
    """Observed disagreement: over pairs within units, each unit weighted by its values; expected: over all pairs."""
    rng = np.random.default_rng(0)
    found = [list(rng.integers(0, 3, size=size).astype(float)) for size in rng.integers(1, 6, size=60)]
    kept = [unit for unit in found if len(unit) > 1]
    values = [v for unit in kept for v in unit]
    for level, power in (("nominal", 0), ("interval", 2)):

        def distance(x, y, power=power):
            return float(x != y) if power == 0 else (x - y) ** power

        observed = sum(sum(distance(x, y) for x, y in permutations(unit, 2)) / (len(unit) - 1) for unit in kept)
        expected = sum(distance(x, y) for x, y in permutations(values, 2)) / (len(values) - 1)
        assert alpha(found, level) == pytest.approx(1 - observed / expected)


def test_where_it_is_not_defined():
    assert alpha([[1.0], [2.0]]) is None  # no pair
    assert alpha([[1.0, 1.0], [1.0, 1.0]]) is None  # no variation
    assert of_judges([{"x": "a"}, {"y": "b"}]) is None
    assert of_judges([{"x": "a"}, {"x": "a"}])["nominal"] is None
    assert of_judges([{"x": "a", "y": "invalid"}, {"x": "b", "y": "b"}])["n"] == 1


def test_judges_with_overlapping_shares():
    """A tie beside a win is closer than a loss is, nominal alpha does not care; the interval holds the value."""
    rng = np.random.default_rng(1)
    truth = {i: ("a", "tie", "b")[rng.integers(0, 3)] for i in range(200)}
    near = {"a": "tie", "tie": "b", "b": "tie"}
    judges = []
    for n in range(3):
        share = [i for i in truth if i < 80 or i % 3 == n]
        judges.append({i: near[truth[i]] if rng.random() < 0.2 else truth[i] for i in share})
    found = of_judges(judges)
    assert found["n"] == 80 and found["judges"] == 3
    assert 0.4 < found["nominal"] < found["ordinal"] < 1
    assert found["interval"][0] < found["nominal"] < found["interval"][1]
    assert found == of_judges(judges)
