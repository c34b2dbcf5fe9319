"""The reward-KL plane with every method, the best-of-n curve and the optimum, and what follows from its points."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import shared
from .collect import Collected
from .shared import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SWEPT = (("beta", "β="), ("alpha", "α="), ("target_kl", "KL*="))  # what a method sweeps, and how it is written
_METHODS = (
    "dpo",
    "unlikelihood",
    "ppo",
    "ppo-gt",
    "ppo-gt-trl-2023",
    "preferred-ft",
    "sft",
)  # these keep their colours
_CURVES = ("best-of-n", "optimum")
_LABEL_OFFSETS = ((8, -15), (-8, 8), (8, 8), (-8, -15))  # of a point's label, by method: points may lie close together


def plane(collected: Collected) -> Drawing | None:
    """Mean reward against sequence KL, with standard errors of both; a line joins the points of a run in order."""
    lines: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for run in collected.runs:
        for p in run.points:
            lines[p["method"], run.name].append(p)
    for p in collected.evaluations:
        lines[p["method"], f"{p['model']} evaluated"].append(p)
    lines = {
        (method, name): drawn
        for (method, name), points in lines.items()
        if method not in _CURVES and (drawn := [p for p in points if p.get("kl") is not None])
    }
    if not lines:
        return None
    figure, axes = shared.axes()
    place = {m: i for i, m in enumerate(_order({method for method, _ in lines}))}
    labelled: set[str] = set()
    for (method, _), points in sorted(lines.items(), key=lambda item: place[item[0][0]]):
        points.sort(key=lambda p: (p.get("step") is None, p.get("step") or 0))
        _draw_line(axes, points, place[method], label=None if method in labelled else method)
        labelled.add(method)
        swept = swept_option(points[-1])
        if swept and f"{method} {swept}" not in labelled:  # the points of a run and its evaluation share one label
            labelled.add(f"{method} {swept}")
            _annotate(axes, points[-1], swept, place[method])
    every = [p for points in lines.values() for p in points]
    _draw_best_of_n(axes, collected.evaluations)
    _draw_optimum(axes, optimum_curve(collected), max(p["kl"] for p in every))
    axes.set_xlabel("sequence KL to the reference (nats)")
    axes.set_ylabel(f"mean reward ({every[0].get('scorer', 'reward').rpartition('@')[2]})")
    shared.legend(figure, axes)
    caption = (
        "The reward-KL plane: mean reward of completions of test prompts against the sequence KL to the reference, n = "
        f"{shared.count_range({p['n'] for p in every})} completions per point; bars are one standard error."
    )
    return Drawing("frontier", caption + _caption_of_optimum(collected), figure)


def _order(methods: set[str]) -> list[str]:
    return [m for m in _METHODS if m in methods] + sorted(methods - set(_METHODS))


def swept_option(point: dict) -> str:
    """The swept option as it is written next to a point, for example β=0.1; empty where there is none."""
    options = point.get("options") or {}
    for name, sign in _SWEPT:
        if options.get(name) is not None and (name == "alpha" or point["method"] != "unlikelihood"):
            return f"{sign}{options[name]:g}"
    return ""


def _draw_line(axes: Axes, points: list[dict], i: int, label: str | None) -> None:
    axes.errorbar(
        [p["kl"] for p in points],
        [p["reward"] for p in points],
        xerr=[p["kl_se"] for p in points],
        yerr=[p["reward_se"] for p in points],
        color=shared.colour(i),
        marker=shared.marker(i),
        markersize=4.5,
        linestyle=shared.line(i),
        linewidth=1.1,
        elinewidth=0.6,
        label=label,
    )


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


def _draw_best_of_n(axes: Axes, evaluations: list[dict]) -> None:
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


def _draw_optimum(axes: Axes, curve: list[dict], widest: float) -> None:
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


def optimum_curve(collected: Collected) -> list[dict]:
    """The supported points of the optimum, by rising KL."""
    curve = [p for p in collected.evaluations if p["method"] == "optimum" and p.get("supported", True)]
    return sorted(curve, key=lambda p: p["kl"])


def _caption_of_optimum(collected: Collected) -> str:
    curve = optimum_curve(collected)
    if not curve:
        return ""
    samples, prompts = curve[0]["options"]["samples"], curve[0]["n"]
    effective = min(p["effective_samples"] for p in curve)
    return (
        f" Black: the KL-constrained optimum, estimated from {samples} reference samples of each of {prompts} prompts "
        f"at temperature {curve[0].get('temperature') or 1:g}, drawn where it rests on at least {effective:.0f} "
        "effective samples per prompt (dotted beyond). With few samples the estimate is too low."
    )


def above_optimum(collected: Collected) -> list[str]:
    """The points more than two standard errors above the optimum at their KL, described in words.

    Beyond the last supported KL of the optimum nothing is known, and nothing is flagged.
    """
    curve = optimum_curve(collected)
    found = []
    for p in collected.points if curve else []:
        if p["method"] in _CURVES or p.get("kl") is None or not curve[0]["kl"] <= p["kl"] <= curve[-1]["kl"]:
            continue
        limit, error = _limit_at(curve, p)
        if p["reward"] > limit + 2 * error:
            at = f" at update {p['step']}" if p.get("step") is not None else ""
            found.append(
                f"{Path(p['model']).name}{at}: reward {p['reward']:.3f} at KL {p['kl']:.2f}; the optimum there is "
                f"{limit:.3f} (error {error:.3f})"
            )
    return found


def _limit_at(curve: list[dict], point: dict) -> tuple[float, float]:
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


def kl_against_beta(points: list[dict]) -> Drawing | None:
    """The final KL of each beta; several seeds of a beta are several points."""
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
    for run in collected.runs:
        pairs = ((run.manifest or {}).get("metrics") or {}).get("pairs")
        if run.stage == "train-dpo" and pairs and run.points:
            key = tuple(run.options.get(k) for k in ("loss", "beta", "alpha", "lr"))
            groups[key].append((pairs, run.points[-1]))
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
