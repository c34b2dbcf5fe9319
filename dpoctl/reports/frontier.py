"""The reward-KL plane with every family, the best-of-n curve and the optimum; what lies above the optimum; KL against beta."""

import math
from collections import defaultdict
from pathlib import Path

from . import shared
from .collect import Collected

_KNOBS = (("beta", "β="), ("alpha", "α="), ("target_kl", "KL*="))  # what a family sweeps, and how it is written
_FAMILIES = (
    "dpo",
    "unlikelihood",
    "ppo",
    "ppo-gt",
    "ppo-gt-trl-2023",
    "preferred-ft",
    "sft",
)  # fixed colours, as far as known
_CURVES = ("best-of-n", "optimum")
_SIDES = ((8, -15), (-8, 8), (8, 8), (-8, -15))  # of a point's label, by family: points of two may lie close together


def plane(collected: Collected):
    """Mean reward against sequence KL, one standard error both ways; a run's points are joined along its updates."""
    points = [p | {"line": run.name} for run in collected.runs for p in run.points] + collected.evaluations
    points = [p for p in points if p.get("kl") is not None and p["method"] not in _CURVES]
    if not points:
        return None
    lines: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for p in points:
        lines[p["method"], p.get("line") or f"{p['model']} evaluated"].append(p)
    from matplotlib.patheffects import withStroke

    figure, axes = shared.axes()
    named: set[str] = set()
    place = {m: i for i, m in enumerate(_order({method for method, _ in lines}))}
    for (method, _), own in sorted(lines.items(), key=lambda item: place[item[0][0]]):
        i = place[method]
        own.sort(key=lambda p: (p.get("step") is None, p.get("step") or 0))
        axes.errorbar([p["kl"] for p in own], [p["reward"] for p in own], xerr=[p["kl_se"] for p in own],
                      yerr=[p["reward_se"] for p in own], color=shared.COLOURS[i % 7], marker=shared.MARKERS[i % 7],
                      markersize=4.5, linestyle=shared.LINES[i % 4], linewidth=1.1, elinewidth=0.6,
                      label=None if method in named else method)  # fmt: skip
        knob = knob_of(own[-1])
        if knob and f"{method} {knob}" not in named:  # a run's own points and its evaluation share one label
            named.add(f"{method} {knob}")
            x, y = _SIDES[i % len(_SIDES)]
            axes.annotate(knob, (own[-1]["kl"], own[-1]["reward"]), textcoords="offset points", xytext=(x, y), fontsize=7,
                          ha="left" if x > 0 else "right", color=shared.COLOURS[i % 7], zorder=5,
                          path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
        named.add(method)
    widest = max(p["kl"] for p in points)
    _draw_best_of_n(axes, collected.evaluations)
    _draw_optimum(axes, optimum_curve(collected), widest)
    axes.set_xlabel("sequence KL to the reference (nats)")
    axes.set_ylabel(f"mean reward ({points[0].get('scorer', 'reward').rpartition('@')[2]})")
    shared.legend(figure, axes)
    n = sorted({p["n"] for p in points})
    sizes = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
    caption = (
        f"The reward-KL plane: mean reward of completions of test prompts against the sequence KL to the reference, n = "
        f"{sizes} completions a point, bars of one standard error."
    )
    return "frontier", caption + _caption_of_curves(collected), figure


def _order(methods: set[str]) -> list[str]:
    return [m for m in _FAMILIES if m in methods] + sorted(methods - set(_FAMILIES))


def knob_of(point: dict) -> str:
    """What was swept, as it is written beside a point: β=0.1."""
    options = point.get("options") or {}
    wanted = "alpha" if point["method"] == "unlikelihood" else None
    for name, sign in _KNOBS:
        if options.get(name) is not None and wanted in (None, name):
            return f"{sign}{options[name]:g}"
    return ""


def _draw_best_of_n(axes, evaluations: list[dict]) -> None:
    curve = sorted((p for p in evaluations if p["method"] == "best-of-n"), key=lambda p: p["kl"])
    if not curve:
        return
    axes.errorbar([p["kl"] for p in curve], [p["reward"] for p in curve], yerr=[p["reward_se"] for p in curve], color="#777777",
                  marker="*", markersize=7, linestyle=":", linewidth=1, label="best-of-n (KL: its bound)")  # fmt: skip
    last = curve[-1]
    axes.annotate(f"n={last['options']['n']}", (last["kl"], last["reward"]), textcoords="offset points", xytext=(5, 4),
                  fontsize=7, color="#555555")  # fmt: skip


def _draw_optimum(axes, curve: list[dict], widest: float) -> None:
    """The exact optimum, drawn as far as its samples support it; a dotted end says that it stops there, not that it ends."""
    if not curve:
        return
    kl, reward = [p["kl"] for p in curve], [p["reward"] for p in curve]
    low, high = ([r + sign * p["reward_se"] for r, p in zip(reward, curve, strict=True)] for sign in (-1, 1))
    axes.fill_between(kl, low, high, color="#000000", alpha=0.12, linewidth=0)
    axes.plot(
        kl, reward, color="#000000", linewidth=2, label=f"optimum ({curve[0]['options']['samples']} samples a prompt)"
    )
    if widest > kl[-1]:
        axes.plot([kl[-1], widest], [reward[-1]] * 2, color="#000000", linewidth=1, linestyle=(0, (1, 4)))


def optimum_curve(collected: Collected) -> list[dict]:
    """The supported points of the optimum, by rising KL."""
    curve = [p for p in collected.evaluations if p["method"] == "optimum" and p.get("supported", True)]
    return sorted(curve, key=lambda p: p["kl"])


def _caption_of_curves(collected: Collected) -> str:
    curve = optimum_curve(collected)
    if not curve:
        return ""
    return (
        f" Black: the KL-constrained optimum, estimated from {curve[0]['options']['samples']} reference samples of each of "
        f"{curve[0]['n']} prompts at temperature {curve[0].get('temperature') or 1:g}, drawn while it rests on at least "
        f"{min(p['effective_samples'] for p in curve):.0f} effective samples a prompt (dotted beyond); it lies low where samples are "
        "few."
    )


def above_optimum(collected: Collected) -> list[str]:
    """Points more than two standard errors above the optimum at their KL, in words; they ask to be looked into.

    Beyond the optimum's last supported KL nothing is known, and nothing flagged.
    """
    curve = optimum_curve(collected)
    found = []
    for p in collected.points:
        if (
            not curve
            or p["method"] in _CURVES
            or p.get("kl") is None
            or not curve[0]["kl"] <= p["kl"] <= curve[-1]["kl"]
        ):
            continue
        after = next(i for i, c in enumerate(curve) if c["kl"] >= p["kl"])
        low, high = curve[max(after - 1, 0)], curve[after]
        share = (p["kl"] - low["kl"]) / max(high["kl"] - low["kl"], 1e-12)
        limit = low["reward"] + share * (high["reward"] - low["reward"])
        error = math.hypot(p["reward_se"], high["reward_se"])
        # the point's KL is an estimate too: what it is worth along the curve
        slope = (high["reward"] - low["reward"]) / max(high["kl"] - low["kl"], 1e-12)
        error = math.hypot(error, slope * p["kl_se"])
        if p["reward"] > limit + 2 * error:
            at = f" at update {p['step']}" if p.get("step") is not None else ""
            found.append(
                f"{Path(p['model']).name}{at}: reward {p['reward']:.3f} at KL {p['kl']:.2f}, the optimum there is {limit:.3f} "
                f"(error {error:.3f})"
            )
    return found


def kl_against_beta(points: list[dict]):
    """The final KL of each beta; several seeds of a beta are several points."""
    final = {p["model"]: p for p in points if p.get("kl") is not None and (p.get("options") or {}).get("beta")}
    final = sorted((p for p in final.values() if p["method"] == "dpo"), key=lambda p: p["options"]["beta"])
    if len({p["options"]["beta"] for p in final}) < 2:
        return None
    figure, axes = shared.axes(5.4)
    axes.errorbar([p["options"]["beta"] for p in final], [p["kl"] for p in final], yerr=[p["kl_se"] for p in final],
                  color=shared.COLOURS[0], marker="o", linestyle="none", capsize=3)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("beta")
    axes.set_ylabel("sequence KL of the final policy (nats)")
    return "kl-against-beta", "How far each beta lets the policy go: sequence KL of the final policies.", figure


def reward_against_pairs(collected: Collected):
    """Final reward against the number of preference pairs, where runs differ in nothing but that."""
    groups: dict[tuple, list[tuple[int, dict]]] = defaultdict(list)
    for run in collected.runs:
        pairs = ((run.manifest or {}).get("metrics") or {}).get("pairs")
        if run.stage == "train-dpo" and pairs and run.points:
            key = tuple(run.options.get(k) for k in ("loss", "beta", "alpha", "lr"))
            groups[key].append((pairs, run.points[-1]))
    groups = {key: own for key, own in groups.items() if len({n for n, _ in own}) > 1}
    if not groups:
        return None
    figure, axes = shared.axes(5.4)
    for i, ((loss, beta, *_), own) in enumerate(sorted(groups.items(), key=str)):
        own.sort(key=lambda pair: pair[0])
        axes.errorbar([n for n, _ in own], [p["reward"] for _, p in own], yerr=[p["reward_se"] for _, p in own], capsize=3,
                      color=shared.COLOURS[i % 7], marker=shared.MARKERS[i % 7], label=f"{loss}, β={beta:g}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("preference pairs")
    axes.set_ylabel("mean reward of the final policy")
    shared.legend(figure, axes)
    return "reward-against-pairs", "Reward of the final policy against the size of the preference set.", figure
