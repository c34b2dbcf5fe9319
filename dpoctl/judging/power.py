"""How much n comparisons can tell. Standard library only.

Sample sizes as for a one-sample test of a proportion (Fleiss, Levin and Paik 2003, chapter 2.5).
"""

import math
from statistics import NormalDist
from typing import Any

LEVEL, POWER = 0.05, 0.8  # two-sided level of the test, and how often it finds what is there


def half_width(n: int, level: float = LEVEL) -> float:
    """Half the width of Wilson's interval of a win rate of 1/2 over n comparisons, in shares (0.069 at n = 200)."""
    z = _z(1 - level / 2)
    return z / (2 * math.sqrt(n + z**2))


def detectable(n: int, ties: float = 0.0, power: float = POWER, level: float = LEVEL) -> float:
    """The smallest distance of a win rate from 1/2 that the interval of n comparisons excludes with this `power`.

    Wilson's interval excludes 1/2 where the observed rate is further than z/(2 sqrt(n)) from it, whatever the share of
    `ties`; a tie, half a win, makes the observed rate vary less. 1/2 is the most that there is.
    """
    threshold, z = _z(1 - level / 2) / (2 * math.sqrt(n)), _z(power)
    low, high = 0.0, 0.5 * (1 - ties)  # with so many ties a win rate is at most this far from 1/2
    if threshold + z * _deviation(high, ties, n) > high:
        return 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if middle >= threshold + z * _deviation(middle, ties, n) else (middle, high)
    return high


def _deviation(difference: float, ties: float, n: int) -> float:
    """Standard deviation of the observed win rate where the true one is `difference` from 1/2."""
    return math.sqrt(max(0.0, (1 - ties) / 4 - difference**2) / n)


def smallest_effect(error: float, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest effect that an estimate with this standard `error` is shown to differ from 0, with this `power`."""
    return (_z(1 - level / 2) + _z(power)) * error


def lines(comparisons: int, prompts: int) -> dict[str, Any]:
    """What --dry-run prints: the win rates that so many comparisons tell from 0.5.

    Several comparisons of a prompt are worth between one and as many; how many is not known before they are judged.
    """
    if not comparisons:
        return {}
    name = f"difference found ({POWER:.0%} power at {LEVEL:.0%})"
    if detectable(comparisons) == 0.5:
        return {name: "none: too few comparisons"}
    least, most = (f"{100 * detectable(n):.1f}" for n in (comparisons, prompts))
    points = least if comparisons == prompts else f"{least} to {most}"
    return {name: f"win rate {points} points from 50 %"}


def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)
