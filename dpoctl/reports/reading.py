"""What the reward-KL plane says, in sentences: which method is ahead at which KL, and by how many standard errors."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import efficiency, frontier
from .collect import Collected
from .origins import Point

_LEVELS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)  # nats
_APART = 2.0  # a point's KL may be so many times that of the point before, for the line between them to be read
_SENTENCES = 3  # on levels of the KL
_CLEAR = 2.0  # standard errors of a difference that is claimed


class Setting(NamedTuple):
    """What is swept, as text, and all that tells the settings of a method apart."""

    text: str
    options: str


Paths = dict[str, dict[Setting, list[list[Point]]]]  # method -> setting -> the paths of its runs in the plane


class Value(NamedTuple):
    """A number of a method with its standard error; `setting` says of which setting, `runs` of how many runs.

    `reward`: of the policies whose efficiency the number is.
    """

    method: str
    setting: str
    value: float
    error: float
    runs: int
    reward: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.method} ({self.setting})" if self.setting else self.method


def sentences(collected: Collected) -> list[str]:
    """At most three sentences on methods at equal KL, one on efficiency, and what the errors leave out.

    None where there is one method. Compared are methods, each by its best setting; seeds of a setting are averaged. A
    difference of less than two standard errors is no lead.
    """
    paths = _paths(collected)
    levels = [(kl, found) for kl in _LEVELS if len(found := _at(paths, kl)) > 1]
    chosen = sorted({0, len(levels) // 2, len(levels) - 1})[:_SENTENCES] if levels else []
    most_efficient = _most_efficient(collected)
    compared = [*(levels[i][1][:2] for i in chosen), most_efficient]
    told = [_ahead(*levels[i]) for i in chosen] or _no_common_kl(paths)
    told += _efficiency(*most_efficient) if most_efficient else []
    alone = dict.fromkeys(value.name for values in compared for value in values if value.runs == 1)
    if alone:
        told.append(
            f"The spread between training seeds is not in these errors where there is one run: {', '.join(alone)}."
        )
    return told


# --- at equal KL -----------------------------------------------------------------------------------------------------


def _paths(collected: Collected) -> Paths:
    """The paths of all methods, of one reference, scorer and temperature.

    Models that were evaluated once each are one path of their method, by rising KL.
    """
    lines, key_of = [line for line in frontier.lines(collected) if line.joined], _keys(collected)
    kinds = Counter(efficiency.measure_of(p) for line in lines for p in line.points)
    if not kinds:
        return {}
    kind = kinds.most_common(1)[0][0]
    found: Paths = defaultdict(lambda: defaultdict(list))
    single: dict[str, list[Point]] = defaultdict(list)
    for line in lines:
        points = [p for p in line.points if efficiency.measure_of(p) == kind]
        if len(points) > 1:
            found[line.series][key_of(points)].append(points)
        elif points:
            single[line.series].append(points[0])
    for method, points in single.items():
        if len(points) > 1:
            found[method][Setting("", "")].append(sorted(points, key=lambda p: p["kl"]))
    return found


def _keys(collected: Collected) -> Callable[[Sequence[Point]], Setting]:
    """A function from the points of one model to its setting: equal for runs that differ in the seed alone.

    Runs are told apart by their loss and all numbers, points of unknown runs by what they say of themselves.
    """
    options: dict[str | None, dict[str, Any]] = {run.origin.policy: run.options for run in collected.runs}
    options.pop(None, None)

    def key_of(points: Sequence[Point]) -> Setting:
        swept = {frontier.swept_option(p) for p in points}
        every = options.get(points[-1].origin.policy) or points[-1].get("options") or {}
        kept = {k: v for k, v in every.items() if k == "loss" or isinstance(v, int | float)}
        kept = {k: v for k, v in kept.items() if k not in ("seed", "ilql_beta")}
        return Setting(swept.pop() if len(swept) == 1 else "", str(sorted(kept.items())))

    return key_of


def _at(paths: Paths, kl: float) -> list[Value]:
    """The reward of each method at a KL, by its best setting; the highest first."""
    found = []
    for method, settings in paths.items():
        values = [
            _mean(method, setting.text, [v for path in runs if (v := _interpolated(path, kl))])
            for setting, runs in settings.items()
        ]
        known = [v for v in values if v]
        if known:
            found.append(max(known, key=lambda v: v.value))
    return sorted(found, key=lambda v: -v.value)


def _interpolated(path: Sequence[Point], kl: float) -> tuple[float, float] | None:
    """(reward, standard error) where a path first crosses a KL, between two points that are near each other.

    None where it does not, or has no errors. The points of a path share prompts: their errors are averaged as they are.
    The error of the KL counts by the slope.
    """
    for a, b in zip(path, path[1:], strict=False):
        low, high = (a, b) if a["kl"] <= b["kl"] else (b, a)
        if low["kl"] <= kl <= high["kl"] <= _APART * low["kl"] and low["kl"] < high["kl"]:
            share = (kl - low["kl"]) / (high["kl"] - low["kl"])
            slope = (high["reward"] - low["reward"]) / (high["kl"] - low["kl"])
            reward, reward_se, kl_se = (
                (1 - share) * (low.get(name) or 0.0) + share * (high.get(name) or 0.0)
                for name in ("reward", "reward_se", "kl_se")
            )
            error = math.hypot(reward_se, slope * kl_se)
            return None if math.isnan(error) or not error else (reward, error)
    return None


def _mean(method: str, setting: str, values: Sequence[tuple[float, float]]) -> Value | None:
    """The mean over seeds. Its error: that of the prompts, which seeds share, and that of the seeds."""
    if not values:
        return None
    n = len(values)
    mean = sum(value for value, _ in values) / n
    spread = math.sqrt(sum((value - mean) ** 2 for value, _ in values) / (n - 1) / n) if n > 1 else 0.0
    return Value(method, setting, mean, math.hypot(sum(error for _, error in values) / n, spread), n)


def _ahead(kl: float, found: Sequence[Value]) -> str:
    first, second = found[:2]
    apart = (first.value - second.value) / math.hypot(first.error, second.error)
    numbers = f"{first.value:.3f} ± {first.error:.3f} against {second.value:.3f} ± {second.error:.3f}"
    if apart < _CLEAR:
        return (
            f"At KL {kl:g} no method is clearly ahead: {first.name} and {second.name} have rewards of {numbers}, "
            f"{apart:.1f} standard errors apart."
        )
    return (
        f"At KL {kl:g} {first.name} is ahead of the next method, {second.name}: reward {numbers}, {apart:.1f} standard "
        "errors apart."
    )


def _no_common_kl(paths: Paths) -> list[str]:
    """Over which KL each of several methods was measured."""
    if len(paths) < 2:
        return []
    spans = []
    for method, settings in paths.items():
        kls = [
            p["kl"] for runs in settings.values() for path in runs for p in path if p["kl"] > 2 * (p["kl_se"] or 0.0)
        ]
        if kls:
            spans.append(f"{method} from {min(kls):.2g} to {max(kls):.2g} nats")
    return [f"No two methods have near points around one KL: {'; '.join(spans)}."] if len(spans) > 1 else []


# --- efficiency ------------------------------------------------------------------------------------------------------


def _most_efficient(collected: Collected) -> list[Value]:
    """The method whose final policies are the most efficient, and the next; empty where there are not two.

    Policies with a bound alone are left out.
    """
    curves, key_of = efficiency.curves(collected), _keys(collected)
    groups: dict[tuple[str, Setting], list[tuple[float, float, float]]] = defaultdict(list)
    for p in collected.final_points:
        found = efficiency.efficiency(p, curves)
        known = found.value and not found.at_least and 0 < found.error <= found.value / 2
        if known and p["method"] not in ("optimum", "best-of-n"):
            groups[p["method"], key_of([p])].append((found.value or 0.0, found.error, p["reward"]))
    best: dict[str, Value] = {}
    for (method, setting), values in groups.items():
        value = _mean(method, setting.text, [(v, error) for v, error, _ in values])
        if value and (method not in best or value.value > best[method].value):
            best[method] = value._replace(reward=sum(reward for *_, reward in values) / len(values))
    return sorted(best.values(), key=lambda v: -v.value)[:2] if len(best) > 1 else []


def _efficiency(first: Value, second: Value) -> list[str]:
    apart = (first.value - second.value) / math.hypot(first.error, second.error)
    lead = "leads" if apart >= _CLEAR else "does not clearly lead"
    return [
        f"In efficiency {first.name} {lead} among final policies: {_percent(first)} at reward {first.reward:.3f}, "
        f"{second.name} {_percent(second)} at reward {second.reward:.3f}, {apart:.1f} standard errors apart."
    ]


def _percent(value: Value) -> str:
    return f"{100 * value.value:.1f} % ± {100 * value.error:.1f} %"
