"""Efficiency: the KL that the exact optimum needs for a policy's reward, divided by the policy's own KL.

The optimum of the KL-constrained problem (2305.18290, equation 4) has the smallest KL of all policies with its reward,
so that 1 is the most. It is read off `evaluate --optimum`, of the same reference, scorer and temperature.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .collect import Collected
from .origins import Point

_NO_CURVE = "no optimum in the report: evaluate --completions SAMPLES --optimum on samples of the reference adds it"


class Efficiency(NamedTuple):
    """A policy's efficiency with its standard error, or why there is none.

    `at_least`: a lower bound. `error` takes the policy's and the optimum's errors as independent; nan where they are
    not known. `why` is empty for a point without a KL.
    """

    value: float | None
    error: float = math.nan
    at_least: bool = False
    why: str = ""


class Curve(NamedTuple):
    """The supported points of one optimum by rising KL, and of what it is: reference, scorer, temperature."""

    points: list[Point]
    measure: tuple[object, ...]


def curves(collected: Collected) -> list[Curve]:
    """Every optimum of the report, the one with the most points first."""
    groups: dict[tuple[str, tuple[object, ...]], list[Point]] = defaultdict(list)
    for p in collected.evaluations:
        if p["method"] == "optimum" and p.get("supported", True):
            groups[p["model"], measure_of(p)].append(p)
    found = [Curve(sorted(group, key=lambda p: p["kl"]), measure) for (_, measure), group in groups.items()]
    return sorted(found, key=lambda curve: -len(curve.points))


def measure_of(point: Point) -> tuple[object, ...]:
    """What two points must share to be compared: reference, scorer with its score type or function, temperature."""
    name = str(point.get("scorer", ""))
    kind = name.rpartition(":" if name.startswith("python:") else "@")[2]
    scorer = point.origin.scorer and (point.origin.scorer, kind)
    return (point.origin.reference, scorer, point.get("temperature"))


def may_match(point: Point, curve: Curve) -> bool:
    """Whether nothing says that a point was measured with another reference, scorer or temperature than a curve."""
    return all(
        one == other or None in (one, other) for one, other in zip(measure_of(point), curve.measure, strict=True)
    )


def efficiency(point: Point, found: Sequence[Curve]) -> Efficiency:
    """The efficiency of a policy's point by the optimum that belongs to it."""
    kl, kl_se = (point.get("kl_exact"), point.get("kl_exact_se"))
    if kl is None:
        kl, kl_se = point.get("kl"), point.get("kl_se")
    if kl is None:
        return Efficiency(None)
    if not found:
        return Efficiency(None, why=_NO_CURVE)
    if kl <= 2 * _known(kl_se):
        return Efficiency(None, why="its KL is not above 0")
    measure = measure_of(point)
    if None in measure:
        unknown = ("reference", "scorer", "temperature")[measure.index(None)]
        return Efficiency(None, why=f"its {unknown} is unknown: the manifest beside its file tells it")
    curve = next((curve for curve in found if curve.measure == measure), None)
    if curve is None:
        return Efficiency(None, why=_no_match(measure, found))
    return _on(curve.points, point["reward"], _known(point.get("reward_se")), kl, _known(kl_se))


def _no_match(measure: tuple[object, ...], found: Sequence[Curve]) -> str:
    if any(None in curve.measure for curve in found):
        return "the optimum's reference or scorer is unknown: the manifests of its file and of the samples tell them"
    differ = [
        name
        for i, name in enumerate(("reference", "scorer", "temperature"))
        if all(curve.measure[i] != measure[i] for curve in found)
    ]
    return f"the optimum is of another {' and '.join(differ) or 'measurement'}"


def _on(curve: Sequence[Point], reward: float, reward_se: float, kl: float, kl_se: float) -> Efficiency:
    """The efficiency of a policy with this reward and KL, by linear interpolation between two points of the curve."""
    rising = [curve[0]]
    for p in curve[1:]:
        if p["reward"] > rising[-1]["reward"] and p["kl"] > rising[-1]["kl"]:
            rising.append(p)
    if reward > rising[-1]["reward"]:
        why = "its reward is beyond the samples of the optimum"
        return Efficiency(rising[-1]["kl"] / kl, at_least=True, why=why)
    if reward <= rising[0]["reward"]:  # the weakest tilt, which is the reference
        return Efficiency(0.0, why="its reward is not above the reference's")
    after = next(i for i, p in enumerate(rising) if p["reward"] >= reward)
    low, high = rising[after - 1], rising[after]
    slope = (high["kl"] - low["kl"]) / (high["reward"] - low["reward"])
    needed = low["kl"] + slope * (reward - low["reward"])
    error = math.hypot(slope * math.hypot(reward_se, _known(high["reward_se"])) / needed, kl_se / kl)
    return Efficiency(needed / kl, needed / kl * error)


def _known(error: float | None) -> float:
    """An error, 0 where there is none."""
    return 0.0 if error is None or math.isnan(error) else error


def of_table(collected: Collected) -> list[Efficiency] | None:
    """The efficiency of each row of the table of evaluations; None where no row has one, for want of an optimum."""
    found = curves(collected)
    return [efficiency(p, found) for p in collected.final_points] if found else None


def told(collected: Collected) -> list[str]:
    """Sentences on rows without an efficiency, one for each reason."""
    found = curves(collected)
    reasons: dict[str, list[str]] = defaultdict(list)
    for p in collected.final_points:
        if p["method"] != "optimum" and (why := efficiency(p, found).why):
            reasons[why].append(name_of_point(p))
    if not found:
        return [_NO_CURVE] if reasons.get(_NO_CURVE) else []
    return [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in reasons.items()]


def numbers(collected: Collected) -> list[dict[str, Any]]:
    """The efficiency of each row of the table that has one, as data."""
    return [
        {"model": p["model"], "method": p["method"], "options": p.get("options"), "step": p.get("step")}
        | {"efficiency": found.value, "at_least": found.at_least}
        | ({} if math.isnan(found.error) else {"efficiency_se": found.error})
        for p, found in zip(collected.final_points, of_table(collected) or [], strict=False)
        if found.value is not None and p["method"] != "optimum"
    ]


def name_of_point(point: dict[str, Any]) -> str:
    """A point's name in tables: of an ILQL model with the beta of its decoding."""
    options = point.get("options") or {}
    name = point.name if isinstance(point, Point) else Path(point["model"]).name
    if point["method"] == "best-of-n":
        folders = name.rpartition("/")[0]
        return f"{folders}: best of {options['n']}" if folders else f"best of {options['n']}"
    beta = options.get("ilql_beta")
    return name + ("" if beta is None else f" β={beta:g}")
