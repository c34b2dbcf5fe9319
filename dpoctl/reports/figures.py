"""Draw and save the figures of a report. A figure without data is left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..objectives.catalogue import traits_of
from ..outputs.files import writing
from . import calibration, checks, frontier, shared, tournament_figures, wins
from .collect import Collected, Run
from .shared import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: Any = {  # rcParams; their names are a type in newer stubs only
    "svg.hashsalt": "dpoctl",
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MANY_POINTS = 30  # a line of as many points has no markers


class SavedFigure(NamedTuple):
    """A figure on disk, in both formats."""

    name: str
    caption: str
    png: Path
    svg: Path


@dataclass(frozen=True)
class Curves:
    """A figure of metrics against updates; each run that has one of `metrics` is drawn."""

    name: str
    metrics: tuple[str, ...]
    ylabel: str
    caption: str
    xlabel: str = "updates"
    zero_line: bool = False


_ACCURACY = Curves(
    "accuracy",
    ("rewards/accuracies", "eval/rewards/accuracies", "accuracy", "eval/accuracy"),
    "share of pairs ranked correctly",
    "Share of pairs ranked correctly by DPO's implicit reward and by the reward model; eval/ is on held-out pairs.",
)
_LOSS = Curves("loss", ("loss", "eval/loss"), "loss", "Loss of each run against updates.")
_LOG_RATIOS = Curves(
    "log-ratios",
    ("log-ratio/chosen", "log-ratio/rejected"),
    "log-ratio to the reference (nats)",
    "Log-ratios log π − log π_ref of chosen and rejected completions, mean over the batch; 0 where policy and "
    "reference agree. Both falling together is likelihood displacement.",
    zero_line=True,
)
_LOG_PROBS = Curves(
    "logps",
    ("logps/chosen", "logps/rejected"),
    "summed log-prob (nats)",
    "Raw log-probs of chosen and rejected completions, mean over the batch, of losses without a reference: with no "
    "log-ratio to draw, the curves also show which pairs are in each batch.",
)
_MARGINS = Curves(
    "margins",
    ("rewards/margins", "eval/rewards/margins"),
    "implicit-reward margin",
    "Margin of the implicit rewards: beta times the difference of the log-ratios.",
)
_PPO_KL = Curves(
    "ppo-kl",
    ("objective/kl",),
    "sequence KL of the episodes (nats)",
    "PPO: KL to the reference of the episodes of each step.",
    xlabel="PPO steps",
)
_PPO_COEFFICIENT = Curves(
    "ppo-coefficient",
    ("objective/kl_coef",),
    "KL coefficient",
    "PPO: coefficient of the KL penalty, as the controller sets it.",
    xlabel="PPO steps",
)


def draw(collected: Collected, folder: Path) -> list[SavedFigure]:
    """Draw what there is data for, and save it as PNG and SVG in `folder`."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        folder.mkdir(parents=True, exist_ok=True)
        found = [drawing for drawing in drawings(collected) if drawing]
        return [SavedFigure(d.name, d.caption, *_save(d.figure, folder / d.name)) for d in found]


def drawings(collected: Collected) -> list[Drawing | None]:
    """Every figure of a report in its order, None for one without data."""
    runs = collected.runs
    pairs = [run for run in runs if any("rewards/accuracies" in row for row in run.metrics)]
    with_reference = [run for run in pairs if _has_reference(run)]
    without_reference = [run for run in pairs if run not in with_reference]
    implicit = [_after_first_update(run) for run in with_reference]
    return [
        frontier.plane(collected),
        frontier.kl_against_beta(collected),
        frontier.reward_against_pairs(collected),
        wins.against_temperature(collected.judged),
        wins.against_step(collected.judged),
        *tournament_figures.drawings(collected.contests),
        calibration.of_judges(collected.judged),
        checks.biases(collected.checked),
        _over_optimisation(runs),
        _fluency(runs),
        _curves(implicit + [run for run in runs if run.stage == "train-rm"], _ACCURACY),
        calibration.calibration(runs),
        _curves([run for run in runs if run.stage != "train-ppo"], _LOSS),
        _curves([_log_ratios(run) for run in with_reference], _LOG_RATIOS),
        _curves(without_reference, _LOG_PROBS),
        _curves(implicit, _MARGINS),
        _curves(runs, _PPO_KL),
        _curves(runs, _PPO_COEFFICIENT),
    ]


def _has_reference(run: Run) -> bool:
    """Does the run's loss compare the policy to a reference, so that implicit rewards are log-ratios?"""
    try:
        return traits_of(run.options.get("loss") or "sigmoid").needs_reference
    except ValueError:  # a loss of another version
        return True


def _after_first_update(run: Run) -> Run:
    """Without the first update, where policy and reference are equal and the sign of a margin is rounding."""
    return replace(run, metrics=[row for row in run.metrics if row.get("step", 0) > 1])


def _log_ratios(run: Run) -> Run:
    """The run with log-ratios, in nats, as its metrics: the implicit rewards divided by beta."""
    beta = run.options["beta"]
    rows = [
        {"step": row["step"]} | {f"log-ratio/{side}": row[f"rewards/{side}"] / beta for side in ("chosen", "rejected")}
        for row in run.metrics
        if "rewards/chosen" in row
    ]
    return replace(run, metrics=rows)


def _save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """(PNG, SVG), without a date or version in them: equal data gives equal bytes."""
    png, svg = stem.with_suffix(".png"), stem.with_suffix(".svg")
    with writing(stem):
        figure.savefig(png, dpi=150, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _curves(runs: list[Run], curves: Curves) -> Drawing | None:
    """One colour for each run, one line style and marker for each of its metrics."""
    series = [
        (run, which, points)
        for run in runs
        for which, metric in enumerate(curves.metrics)
        if (points := [(row["step"], row[metric]) for row in run.metrics if metric in row])
    ]
    if not series:
        return None
    figure, axes = shared.axes()
    if curves.zero_line:
        axes.axhline(0, color="#777777", linewidth=0.8)
    for run, which, points in series:
        style: dict[str, Any] = {"color": shared.colour(run.index)}
        style["linestyle"] = shared.line(which + run.index // len(shared.COLOURS))
        if len(points) < _MANY_POINTS:
            style |= {"marker": shared.marker(which), "markersize": 4}
        several = len(curves.metrics) > 1
        label = f"{run.name}: {curves.metrics[which]}" if several else run.name
        axes.plot(*zip(*points, strict=True), label=label, **style)
        _mark_kept(axes, run, curves.metrics[which])
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(curves.xlabel)
    axes.set_ylabel(curves.ylabel)
    shared.legend(figure, axes)
    return Drawing(curves.name, curves.caption, figure)


def _mark_kept(axes: Axes, run: Run, metric: str) -> None:
    """A star where the weights are from that a run keeps, on the curve of the metric that selected them."""
    kept = run.kept
    if (value := kept.get(metric.replace("eval/", "best/", 1))) is None or not metric.startswith("eval/"):
        return
    label = f"{run.name}: keeps update {kept['best_step']}"
    star: dict[str, Any] = {"color": shared.colour(run.index), "marker": "*", "markersize": 13}
    star["markeredgecolor"] = "#000000"
    axes.plot([kept["best_step"]], [value], linestyle="none", zorder=5, label=label, **star)


def _over_optimisation(runs: list[Run]) -> Drawing | None:
    """The learned reward next to the ground truth over PPO's training, each in its own units."""
    found = [(run, [p for p in run.points if "learned_reward" in p]) for run in runs]
    series = [(run, points) for run, points in found if len(points) > 1 and points[0]["method"] == "ppo"]
    if not series:
        return None
    figure, axes = shared.axes()
    right = axes.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    for run, points in series:
        steps = [p["step"] for p in points]
        true, errors, learned = ([p[name] for p in points] for name in ("reward", "reward_se", "learned_reward"))
        style: dict[str, Any] = {"color": shared.colour(run.index), "markersize": 4}
        axes.errorbar(steps, true, yerr=errors, marker="o", label=f"{run.name}: ground truth (left)", **style)
        right.plot(steps, learned, "--", marker="s", **style)
        axes.plot([], [], "--", marker="s", label=f"{run.name}: learned reward (right)", **style)  # for the legend
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("PPO steps")
    axes.set_ylabel("ground-truth reward")
    right.set_ylabel("learned reward")
    shared.legend(figure, axes)
    caption = (
        "The learned reward that PPO maximises and the ground truth, on test prompts: a learned reward that rises "
        "while the ground truth falls is over-optimisation. Bars are one standard error."
    )
    return Drawing("over-optimisation", caption, figure)


def _fluency(runs: list[Run]) -> Drawing | None:
    """Perplexity of the samples under the reference, and distinct-2, at each evaluation during training."""
    found = [(run, [p for p in run.points if p.get("perplexity_ref")]) for run in runs]
    series = [(run, points) for run, points in found if len(points) > 1]
    if not series:
        return None
    figure, left, right = shared.two_axes()
    for run, points in series:
        style: dict[str, Any] = {"color": shared.colour(run.index), "marker": shared.marker(run.index), "markersize": 4}
        style["linestyle"] = shared.several_rounds(run.index)
        kl = [p["kl"] or 0.0 for p in points]
        left.plot(kl, [p["perplexity_ref"] for p in points], label=run.name, **style)
        right.plot(kl, [p["distinct_2"] for p in points], **style)
    left.set_ylabel("perplexity under the reference")
    right.set_ylabel("distinct-2")
    for axes in (left, right):
        axes.set_xlabel("sequence KL to the reference (nats)")
    shared.legend(figure, left)
    caption = (
        "Fluency during training, against the KL: perplexity of the samples under the reference (left) and the share "
        "of distinct word pairs (right)."
    )
    return Drawing("fluency", caption, figure)
