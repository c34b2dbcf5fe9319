"""What the reward-KL plane says, in sentences: which method is ahead at which KL, and by how many standard errors."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from . import efficiency, frontier
from .collect import Collected
from .origins import Point
from .settings import Setting, keys_of

_LEVELS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)  # nats
_APART = 2.0  # a point's KL may be so many times that of the point before, for the line between them to be read
_SENTENCES = 3  # on levels of the KL
_CLEAR = 2.0  # standard errors of a difference that is claimed


Paths = dict[str, dict[Setting, list[list[Point]]]]  # method -> setting -> the paths of its runs in the plane


class Found(NamedTuple):
    """A number of one run with its standard error; `reward`: of the policy whose efficiency the number is."""

    reference: str | None
    value: float
    error: float
    reward: float = 0.0


class Value(NamedTuple):
    """The mean over the runs of a method's setting."""

    method: str
    setting: str
    runs: list[Found]

    @property
    def value(self) -> float:
        return statistics.fmean(run.value for run in self.runs)

    @property
    def error(self) -> float:
        """The standard error: that of the prompts, which seeds may share, and that of the seeds."""
        n = len(self.runs)
        spread = statistics.stdev(run.value for run in self.runs) / math.sqrt(n) if n > 1 else 0.0
        return math.hypot(statistics.fmean(run.error for run in self.runs), spread)

    @property
    def reward(self) -> float:
        return statistics.fmean(run.reward for run in self.runs)

    @property
    def name(self) -> str:
        return f"{self.method} ({self.setting})" if self.setting else self.method


def sentences(collected: Collected) -> list[str]:
    """At most three sentences on methods at equal KL, one on efficiency, and what the errors leave out.

    None where there is one method. Compared are methods, each by its best setting; seeds of a setting are averaged, and
    so are references, where a whole chain was run for each seed: two methods then on those that both have. A difference
    of less than two standard errors is no lead.
    """
    paths = _paths(collected)
    levels = [(kl, pair) for kl in _LEVELS if (pair := _best_two(_at(paths, kl)))]
    chosen = sorted({0, len(levels) // 2, len(levels) - 1})[:_SENTENCES] if levels else []
    most_efficient = _best_two(_most_efficient(collected))
    compared = [*(value for i in chosen for value in levels[i][1]), *(most_efficient or ())]
    told = [_ahead(*levels[i]) for i in chosen] or _no_common_kl(paths)
    told += _efficiency(*most_efficient) if most_efficient else []
    references = {run.reference for value in compared for run in value.runs}
    if len(references) > 1:
        told.append(f"These are means over {len(references)} references, each with its own policies.")
    alone = dict.fromkeys(value.name for value in compared if len(value.runs) == 1)
    if alone:
        told.append(
            f"The spread between training seeds is not in these errors where there is one run: {', '.join(alone)}."
        )
    return told


def _best_two(values: Sequence[Value]) -> tuple[Value, Value] | None:
    """The highest value and the next, each over the references that both have; None where there are not two."""
    for i, first in enumerate(values):
        for second in values[i + 1 :]:
            both = {run.reference for run in first.runs} & {run.reference for run in second.runs}
            if both:
                pair = [v._replace(runs=[run for run in v.runs if run.reference in both]) for v in (first, second)]
                pair.sort(key=lambda v: -v.value)
                return pair[0], pair[1]
    return None


# --- at equal KL -----------------------------------------------------------------------------------------------------


def _paths(collected: Collected) -> Paths:
    """The paths of all methods, of one scorer and temperature; each path is of one reference.

    Models that were evaluated once each are one path of their method, by rising KL.
    """
    lines, key_of = [line for line in frontier.lines(collected) if line.joined], keys_of(collected)
    kinds = Counter(efficiency.measure_of(p) for line in lines for p in line.points)
    if not kinds:
        return {}
    kind = kinds.most_common(1)[0][0][1:]
    found: Paths = defaultdict(lambda: defaultdict(list))
    single: dict[tuple[str, str | None], list[Point]] = defaultdict(list)
    for line in lines:
        points = [p for p in line.points if efficiency.measure_of(p)[1:] == kind]
        if len(points) > 1:
            found[line.series][key_of(points)].append(points)
        elif points:
            single[line.series, points[0].origin.reference].append(points[0])
    for (method, _), points in single.items():
        if len(points) > 1:
            found[method][Setting("", "")].append(sorted(points, key=lambda p: p["kl"]))
    return found


def _at(paths: Paths, kl: float) -> list[Value]:
    """The reward of each method at a KL, by its best setting; the highest first."""
    found = []
    for method, settings in paths.items():
        values = [
            Value(method, setting.text, known)
            for setting, runs in settings.items()
            if (known := [v for path in runs if (v := _interpolated(path, kl))])
        ]
        if values:
            found.append(max(values, key=lambda v: v.value))
    return sorted(found, key=lambda v: -v.value)


def _interpolated(path: Sequence[Point], kl: float) -> Found | None:
    """The reward where a path first crosses a KL, between two points that are near each other.

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
            return None if math.isnan(error) or not error else Found(a.origin.reference, reward, error)
    return None


def _ahead(kl: float, pair: tuple[Value, Value]) -> str:
    first, second = pair
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
    """Each method's most efficient final policies, the highest first; policies with a bound alone are left out."""
    curves, key_of = efficiency.curves(collected), keys_of(collected)
    groups: dict[tuple[str, Setting], list[Found]] = defaultdict(list)
    for p in collected.final_points:
        found = efficiency.efficiency(p, curves)
        known = found.value and not found.at_least and 0 < found.error <= found.value / 2
        if known and p["method"] not in ("optimum", "best-of-n"):
            run = Found(p.origin.reference, found.value or 0.0, found.error, p["reward"])
            groups[p["method"], key_of([p])].append(run)
    best: dict[str, Value] = {}
    for (method, setting), runs in groups.items():
        value = Value(method, setting.text, runs)
        if method not in best or value.value > best[method].value:
            best[method] = value
    return sorted(best.values(), key=lambda v: -v.value)


def _efficiency(first: Value, second: Value) -> list[str]:
    apart = (first.value - second.value) / math.hypot(first.error, second.error)
    lead = "leads" if apart >= _CLEAR else "does not clearly lead"
    return [
        f"In efficiency {first.name} {lead} among final policies: {_percent(first)} at reward {first.reward:.3f}, "
        f"{second.name} {_percent(second)} at reward {second.reward:.3f}, {apart:.1f} standard errors apart."
    ]


def _percent(value: Value) -> str:
    return f"{100 * value.value:.1f} % ± {100 * value.error:.1f} %"
