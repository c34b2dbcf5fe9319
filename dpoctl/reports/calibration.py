"""The figure of reward models' calibration: their confidence in a preference, and how often they are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..judging.statistics import wilson
from . import shared
from .collect import Run
from .shared import Drawing


def calibration(runs: Sequence[Run]) -> Drawing | None:
    """Accuracy against mean confidence in each bin of held-out pairs, of every train-rm run that is complete."""
    found = [(run, bins) for run in runs if (bins := _bins(run))]
    if not found:
        return None
    figure, axes = shared.axes()
    axes.plot([0.5, 1], [0.5, 1], color="#777777", linewidth=0.8, label="calibrated")
    for run, bins in found:
        confidence, accuracy, pairs = zip(*bins, strict=True)
        intervals = [wilson(a, n) for a, n in zip(accuracy, pairs, strict=True)]
        errors = [
            [max(0.0, a - low) for a, (low, _) in zip(accuracy, intervals, strict=True)],
            [max(0.0, high - a) for a, (_, high) in zip(accuracy, intervals, strict=True)],
        ]
        style: dict[str, Any] = {"color": shared.colour(run.index), "marker": shared.marker(run.index), "markersize": 4}
        style |= {"linestyle": shared.several_rounds(run.index), "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(confidence, accuracy, yerr=errors, label=_label(run, sum(pairs)), **style)
    axes.set_xlabel("confidence σ(|r(chosen) − r(rejected)|)")
    axes.set_ylabel("share of pairs ranked correctly")
    shared.legend(figure, axes)
    caption = (
        "Calibration of the reward models on held-out pairs: how often a model is right, against its confidence in the "
        "completion that it prefers, in bins of the confidence. Below the line it is overconfident. Bars are 95 % "
        "intervals; the error is the mean distance to the line, weighted by pairs."
    )
    return Drawing("calibration", caption, figure)


def _bins(run: Run) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, pairs) of each bin; none of another command, and of a run that is not complete."""
    metrics = (run.manifest or {}).get("metrics", {})
    if run.stage != "train-rm":
        return []
    return [(confidence, accuracy, pairs) for confidence, accuracy, pairs in metrics.get("calibration") or []]


def _label(run: Run, pairs: int) -> str:
    error = (run.manifest or {}).get("metrics", {}).get("eval/calibration_error")
    return f"{run.name}: " + (f"error {error:.3f}, " if error is not None else "") + f"{pairs} pairs"
