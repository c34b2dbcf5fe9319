"""The reward-KL plane with every method, the best-of-n curve and the optimum, and what follows from its points."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import efficiency, efficiency_panel, rounds, shared
from .collect import Collected, Run
from .efficiency_panel import Series
from .origins import Point
from .shared import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a method sweeps, and how it is written
_SWEPT = (("ilql_beta", "β="), ("soft_labels", "τ="), ("beta", "β="), ("alpha", "α="), ("target_kl", "KL*="))
_METHODS = (
    "dpo",
    "unlikelihood",
    "ppo",
    "ppo-gt",
    "ppo-gt-trl-2023",
    "preferred-ft",
    "sft",
    "ilql",
    "distill",
    "dpo-soft",
)  # these keep their colours
_CURVES = ("best-of-n", "optimum")
_ROUNDS = " in rounds"  # behind the method, where policies are rounds of one path
_LABEL_OFFSETS = ((8, -15), (-8, 8), (8, 8), (8, -8))  # of a point's label, by method: points may lie close together


@dataclass
class Line:
    """Points of the plane that a line joins in this order; a series has its colour and its entry in the legend.

    `labels`: (point, text beside it). Points that are not `joined` have no line.
    """

    series: str
    points: list[Point]
    labels: list[tuple[Point, str]]
    joined: bool = True


def plane(collected: Collected) -> Drawing | None:
    """Mean reward against sequence KL, with standard errors of both; a line joins the points of a run in order.

    Rounds are one line.
    """
    every_line = lines(collected)
    if not every_line:
        return None
    found = efficiency.curves(collected)
    place = {m: i for i, m in enumerate(_order({line.series for line in every_line}))}
    every_line.sort(key=lambda line: place[line.series])
    panel = _panel(every_line, place, found)
    figure, axes, right = shared.two_axes(11.6) if panel else (*shared.axes(), None)
    labelled: set[str] = set()
    for line in every_line:
        i = place[line.series]
        style = _style(line, i)
        _draw_line(axes, line.points, i, None if line.series in labelled else line.series, style)
        labelled.add(line.series)
        for point, text in line.labels:
            if f"{line.series} {text}" not in labelled:  # the points of a run and its evaluation share one label
                labelled.add(f"{line.series} {text}")
                _annotate(axes, point, text, i)
    _mark_kept(axes, collected.runs, place)
    every = [p for line in every_line for p in line.points]
    _draw_best_of_n(axes, collected.evaluations)
    _draw_optimum(axes, found[0].points if found else [], max(p["kl"] for p in every))
    axes.set_xlabel("sequence KL to the reference (nats)")
    reward = f"mean reward ({every[0].get('scorer', 'reward').rpartition('@')[2]})"
    axes.set_ylabel(reward)
    if right is not None:
        best = [p for p in collected.evaluations if p["method"] == "best-of-n"]
        efficiency_panel.draw(right, panel, efficiency_panel.measured(best, found), reward)
    shared.legend(figure, axes)
    caption = (
        "The reward-KL plane: mean reward of completions of test prompts against the sequence KL to the reference, n = "
        f"{shared.count_range({p['n'] for p in every})} completions per point; bars are one standard error."
    )
    if any(line.series.endswith(_ROUNDS) for line in every_line):
        caption += " Rounds are one line, from the policy of each to the next."
    caption += "".join(f" {text}." for text in rounds.told(collected))
    caption += _caption_of_optimum(found) + (efficiency_panel.CAPTION if panel else "")
    return Drawing("frontier", caption, figure)


def _panel(every_line: Sequence[Line], place: dict[str, int], found: Sequence[efficiency.Curve]) -> list[Series]:
    """The lines of the panel of efficiency: those with a point that has one."""
    measured = [(line, efficiency_panel.measured(line.points, found)) for line in every_line]
    return [Series(i := place[line.series], _style(line, i), points) for line, points in measured if points]


def _style(line: Line, i: int) -> str:
    """The line style of a line of the series number `i`."""
    return shared.line(0 if line.series.endswith(_ROUNDS) else i) if line.joined else "none"


def lines(collected: Collected) -> list[Line]:
    """The lines of training and evaluated policies, those of rounds joined."""
    chains = rounds.paths(collected.runs)
    joined = {id(run) for chain in chains for run in chain}
    by_policy: dict[str | None, list[Point]] = defaultdict(list)
    for p in collected.evaluations:
        if p["method"] not in _CURVES:
            by_policy[p.origin.policy].append(p)
    found_lines = []
    for chain in chains:
        drawn = [(run, _drawable(run.points)) for run in chain]
        measured = [(run, _drawable(by_policy.get(run.origin.policy, []))) for run in chain if run.origin.policy]
        found = [_path(each) for each in (drawn, measured) if any(points for _, points in each)]
        # of the same policies: one line is enough
        found_lines += [replace(line, joined=line is found[0]) for line in found]
    for run in collected.runs:
        if id(run) not in joined:
            found_lines += _by_method(run.points)
        elif run.origin.policy:
            by_policy.pop(run.origin.policy, None)
    return found_lines + [line for points in by_policy.values() for line in _by_method(points)]


def _path(chain: list[tuple[Run, list[Point]]]) -> Line:
    """The line of rounds, with each round's name at its last point."""
    points = [p for _, found in chain for p in found]
    labels = [(found[-1], run.name) for run, found in chain if found]
    return Line(f"{points[0]['method']}{_ROUNDS}", points, labels)


def _by_method(points: Sequence[Point]) -> list[Line]:
    """A line for each method and model of some points, with the swept option at the last point of each value."""
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for p in _drawable(points):
        groups[p["method"], p["model"]].append(p)
    return [
        Line(method, group, [(p, swept) for swept, p in {swept_option(p): p for p in group}.items() if swept])
        for (method, _), group in groups.items()
    ]


def _drawable(points: Sequence[Point]) -> list[Point]:
    """The points that have a KL, in the order of training; those of one ILQL model by the beta of its decoding."""
    return sorted((p for p in points if p.get("kl") is not None), key=_place_in_line)


def _place_in_line(point: dict) -> tuple[bool, int, float]:
    beta = (point.get("options") or {}).get("ilql_beta")
    return point.get("step") is None, point.get("step") or 0, beta or 0.0


def _order(methods: set[str]) -> list[str]:
    return [m for m in _METHODS if m in methods] + sorted(methods - set(_METHODS))


def swept_option(point: dict) -> str:
    """The swept option as it is written next to a point, for example β=0.1; empty where there is none."""
    options = point.get("options") or {}
    for name, sign in _SWEPT:
        if isinstance(options.get(name), int | float) and (name == "alpha" or point["method"] != "unlikelihood"):
            return f"{sign}{options[name]:g}"
    return ""


def _draw_line(axes: Axes, points: Sequence[Point], i: int, label: str | None, style: str) -> None:
    axes.errorbar(
        [p["kl"] for p in points],
        [p["reward"] for p in points],
        xerr=[p["kl_se"] for p in points],
        yerr=[p["reward_se"] for p in points],
        color=shared.colour(i),
        marker=shared.marker(i),
        markersize=4.5,
        linestyle=style,
        linewidth=1.1,
        elinewidth=0.6,
        label=label,
    )


def _mark_kept(axes: Axes, runs: Sequence[Run], place: dict[str, int]) -> None:
    """A star at the point of the update that a run keeps, where it keeps its best evaluation."""
    label: str | None = "the update that is kept"
    for run in runs:
        if not (run.kept and run.points):
            continue
        point = run.final_point
        if point["step"] != run.kept["best_step"] or point.get("kl") is None:
            continue
        style: dict[str, Any] = {"color": shared.colour(place.get(point["method"], 0)), "marker": "*", "markersize": 13}
        style |= {"markeredgecolor": "#000000", "linestyle": "none", "zorder": 4}
        axes.plot([point["kl"]], [point["reward"]], label=label, **style)
        label = None


def _annotate(axes: Axes, point: dict, text: str, i: int) -> None:
    from matplotlib.patheffects import withStroke

    x, y = _LABEL_OFFSETS[i % len(_LABEL_OFFSETS)]
    axes.annotate(
        text,
        (point["kl"], point["reward"]),
        textcoords="offset points",
        xytext=(x, y),
        fontsize=7,
        ha="left" if x > 0 else "right",
        color=shared.colour(i),
        zorder=5,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )


def _draw_best_of_n(axes: Axes, evaluations: Sequence[Point]) -> None:
    curve = sorted((p for p in evaluations if p["method"] == "best-of-n"), key=lambda p: p["kl"])
    if not curve:
        return
    axes.errorbar(
        [p["kl"] for p in curve],
        [p["reward"] for p in curve],
        yerr=[p["reward_se"] for p in curve],
        color="#777777",
        marker="*",
        markersize=7,
        linestyle=":",
        linewidth=1,
        label="best-of-n (KL: its bound)",
    )
    last = curve[-1]
    at, text = (last["kl"], last["reward"]), f"n={last['options']['n']}"
    axes.annotate(text, at, textcoords="offset points", xytext=(5, 4), fontsize=7, color="#555555")


def _draw_optimum(axes: Axes, curve: Sequence[Point], widest: float) -> None:
    """The exact optimum over the KL range that its samples support, dotted from there to `widest`."""
    if not curve:
        return
    kl, reward = [p["kl"] for p in curve], [p["reward"] for p in curve]
    low, high = ([r + sign * p["reward_se"] for r, p in zip(reward, curve, strict=True)] for sign in (-1, 1))
    label = f"optimum ({curve[0]['options']['samples']} samples per prompt)"
    axes.fill_between(kl, low, high, color="#000000", alpha=0.12, linewidth=0)
    axes.plot(kl, reward, color="#000000", linewidth=2, label=label)
    if widest > kl[-1]:
        axes.plot([kl[-1], widest], [reward[-1]] * 2, color="#000000", linewidth=1, linestyle=(0, (1, 4)))


def _caption_of_optimum(found: Sequence[efficiency.Curve]) -> str:
    if not found:
        return ""
    curve = found[0].points
    samples, prompts = curve[0]["options"]["samples"], curve[0]["n"]
    effective = min(p["effective_samples"] for p in curve)
    others = f" Of {len(found)} estimates of an optimum the first is drawn." if len(found) > 1 else ""
    return (
        f" Black: the KL-constrained optimum, estimated from {samples} reference samples of each of {prompts} prompts "
        f"at temperature {curve[0].get('temperature') or 1:g}, drawn where it rests on at least {effective:.0f} "
        f"effective samples per prompt (dotted beyond). With few samples the estimate is too low.{others}"
    )


def above_optimum(collected: Collected) -> list[str]:
    """The points more than two standard errors above the optimum at their KL, described in words.

    Beyond the last supported KL of the optimum nothing is known, and nothing is flagged; neither are points of another
    reference, scorer or temperature than the optimum's.
    """
    curves = efficiency.curves(collected)
    found = []
    for p in collected.points:
        curve = next((curve.points for curve in curves if efficiency.may_match(p, curve)), None)
        if curve is None or p["method"] in _CURVES or p.get("kl") is None:
            continue
        if not curve[0]["kl"] <= p["kl"] <= curve[-1]["kl"]:
            continue
        limit, error = _limit_at(curve, p)
        if p["reward"] > limit + 2 * error:
            at = f" at update {p['step']}" if p.get("step") is not None else ""
            found.append(
                f"{efficiency.name_of_point(p)}{at}: reward {p['reward']:.3f} at KL {p['kl']:.2f}; the optimum there "
                f"is {limit:.3f} (error {error:.3f})"
            )
    return found


def _limit_at(curve: Sequence[Point], point: Point) -> tuple[float, float]:
    """(reward of the optimum at the point's KL, by linear interpolation; standard error of the difference to it).

    The KL of the point is an estimate too: its error counts by the slope of the curve.
    """
    after = next(i for i, c in enumerate(curve) if c["kl"] >= point["kl"])
    low, high = curve[max(after - 1, 0)], curve[after]
    width = max(high["kl"] - low["kl"], 1e-12)
    slope = (high["reward"] - low["reward"]) / width
    share = (point["kl"] - low["kl"]) / width
    limit = low["reward"] + share * (high["reward"] - low["reward"])
    return limit, math.hypot(point["reward_se"], high["reward_se"], slope * point["kl_se"])


def kl_against_beta(collected: Collected) -> Drawing | None:
    """The final KL of each beta; several seeds of a beta are several points. Later rounds are left out."""
    first = rounds.without_later(collected.runs)
    later = {run.origin.policy for run in collected.runs if run not in first}
    points = [p for p in collected.points if p.origin.policy is None or p.origin.policy not in later]
    last = {p["model"]: p for p in points if p.get("kl") is not None and (p.get("options") or {}).get("beta")}
    final = sorted((p for p in last.values() if p["method"] == "dpo"), key=lambda p: p["options"]["beta"])
    betas = [p["options"]["beta"] for p in final]
    if len(set(betas)) < 2:
        return None
    figure, axes = shared.axes(5.4)
    kl, errors = [p["kl"] for p in final], [p["kl_se"] for p in final]
    axes.errorbar(betas, kl, yerr=errors, color=shared.colour(0), marker="o", linestyle="none", capsize=3)
    axes.set_xscale("log")
    axes.set_xlabel("beta")
    axes.set_ylabel("sequence KL of the final policy (nats)")
    caption = "Sequence KL of the final policy for each beta; bars are one standard error."
    return Drawing("kl-against-beta", caption, figure)


def reward_against_pairs(collected: Collected) -> Drawing | None:
    """Final reward against the number of preference pairs, over runs that differ in nothing else."""
    groups: dict[tuple[Any, ...], list[tuple[int, dict]]] = defaultdict(list)
    for run in rounds.without_later(collected.runs):
        pairs = ((run.manifest or {}).get("metrics") or {}).get("pairs")
        if run.stage == "train-dpo" and pairs and run.points:
            key = tuple(run.options.get(k) for k in ("loss", "beta", "alpha", "lr"))
            groups[key].append((pairs, run.final_point))
    groups = {key: group for key, group in groups.items() if len({pairs for pairs, _ in group}) > 1}
    if not groups:
        return None
    figure, axes = shared.axes(5.4)
    for i, ((loss, beta, *_), group) in enumerate(sorted(groups.items(), key=str)):
        group.sort(key=lambda pair: pair[0])
        axes.errorbar(
            [pairs for pairs, _ in group],
            [p["reward"] for _, p in group],
            yerr=[p["reward_se"] for _, p in group],
            capsize=3,
            color=shared.colour(i),
            marker=shared.marker(i),
            label=f"{loss}, β={beta:g}",
        )
    axes.set_xscale("log")
    axes.set_xlabel("preference pairs")
    axes.set_ylabel("mean reward of the final policy")
    shared.legend(figure, axes)
    caption = "Reward of the final policy against the number of preference pairs; bars are one standard error."
    return Drawing("reward-against-pairs", caption, figure)
