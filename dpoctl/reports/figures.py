"""The figures of a report. A figure without data is left out."""

from collections import defaultdict
from pathlib import Path

from .collect import Collected, Run

# Okabe and Ito's colours, told apart by the colour-blind; marker and line tell them apart in grey
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.", ":")


def draw(collected: Collected, folder: Path) -> list[tuple[str, str, list[Path]]]:
    """Draw what there is data for; returns (name, caption, [PNG, SVG]) of each figure."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "dpoctl", "svg.fonttype": "path", "font.size": 10, "axes.grid": True,
                                "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    dpo = [run for run in collected.runs if any("rewards/accuracies" in row for row in run.metrics)]
    drawn = [
        _plane([p | {"line": run.name} for run in collected.runs for p in run.points] + collected.evaluations),
        _curves(collected.runs, ("loss", "eval/loss"), "loss", "loss", "Loss of each run against updates."),
        _curves(dpo, ("rewards/accuracies", "eval/rewards/accuracies"), "accuracy", "share of pairs with a positive margin",
                "Implicit-reward accuracy: the share of pairs whose chosen completion has the higher implicit reward."),
        _curves(dpo, ("logps/chosen", "logps/rejected"), "logps", "summed log-prob (nats)",
                "Log-probs of chosen and rejected completions apart. Both falling together is likelihood displacement."),
        _curves(dpo, ("rewards/margins", "eval/rewards/margins"), "margins", "implicit-reward margin",
                "Margin of the implicit rewards, beta times the difference of the log-ratios."),
        _kl_against_beta(collected.points),
    ]  # fmt: skip
    return [(name, caption, _save(figure, folder / name)) for name, caption, figure in filter(None, drawn)]


def _save(figure, stem: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=150, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def _axes(wide: float = 7.2):
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(wide, 4.4), layout="constrained")


def _curves(runs: list[Run], names: tuple[str, ...], name: str, label: str, caption: str):
    series = [(run, key, [(r["step"], r[key]) for r in run.metrics if key in r]) for run in runs for key in names]
    series = [(run, key, points) for run, key, points in series if points]
    if not series:
        return None
    figure, axes = _axes()
    order = {run.name: i for i, run in enumerate(runs)}
    for run, key, points in series:
        which = names.index(key)
        style = {"marker": _MARKERS[which], "markersize": 4} if len(points) < 30 else {}
        shown = f"{run.name}: {key}" if len(names) > 1 else run.name
        axes.plot(*zip(*points, strict=True), _LINES[which], color=_COLOURS[order[run.name] % 7], label=shown, **style)
    axes.set_xlabel("updates")
    axes.set_ylabel(label)
    _legend(figure, axes)
    return name, caption, figure


def _legend(figure, axes) -> None:
    """Outside the axes, so that it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _plane(points: list[dict]):
    """Mean reward against sequence KL, one standard error both ways; a run's points are joined along its updates."""
    points = [p for p in points if p.get("kl") is not None]
    if not points:
        return None
    lines: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for p in points:
        lines[p["method"], p.get("line") or f"{p['model']} evaluated"].append(p)
    methods = sorted({method for method, _ in lines})
    figure, axes = _axes()
    named: set[str] = set()
    for (method, _), own in lines.items():
        i = methods.index(method)
        own.sort(key=lambda p: (p.get("step") is None, p.get("step") or 0))
        axes.errorbar([p["kl"] for p in own], [p["reward"] for p in own], xerr=[p["kl_se"] for p in own],
                      yerr=[p["reward_se"] for p in own], color=_COLOURS[i % 7], marker=_MARKERS[i % 7], markersize=5,
                      linestyle=_LINES[i % 4], linewidth=1.2, elinewidth=0.7,
                      label=None if method in named else method)  # fmt: skip
        beta = (own[-1].get("options") or {}).get("beta")
        if (
            beta is not None and f"{method} {beta}" not in named
        ):  # a run's own points and its evaluation share one label
            named.add(f"{method} {beta}")
            axes.annotate(f"β={beta:g}", (own[-1]["kl"], own[-1]["reward"]), textcoords="offset points", xytext=(6, -9),
                          fontsize=8)  # fmt: skip
        named.add(method)
    n = sorted({p["n"] for p in points})
    axes.set_xlabel("sequence KL to the reference (nats)")
    axes.set_ylabel(f"mean reward ({points[0].get('scorer', 'reward').rpartition('@')[2]})")
    _legend(figure, axes)
    sizes = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
    return "frontier", (f"The reward-KL plane: mean reward of completions of test prompts against the sequence KL to the "
                        f"reference, n = {sizes} completions a point, bars of one standard error."), figure  # fmt: skip


def _kl_against_beta(points: list[dict]):
    final = {p["model"]: p for p in points if p.get("kl") is not None and (p.get("options") or {}).get("beta")}
    final = sorted(final.values(), key=lambda p: p["options"]["beta"])
    if len({p["options"]["beta"] for p in final}) < 2:
        return None
    figure, axes = _axes(5.4)
    axes.errorbar([p["options"]["beta"] for p in final], [p["kl"] for p in final], yerr=[p["kl_se"] for p in final],
                  color=_COLOURS[0], marker="o", linestyle="none", capsize=3)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("beta")
    axes.set_ylabel("sequence KL of the final policy (nats)")
    return "kl-against-beta", "How far each beta lets the policy go: sequence KL of the final policies.", figure
