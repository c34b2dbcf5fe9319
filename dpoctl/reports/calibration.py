"""Figures of calibration: how sure reward models and judges are of a preference, and how often they are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..judging.statistics import wilson
from . import shared
from .collect import Judged, Run
from .shared import Drawing

Bins = Sequence[Sequence[float]]  # mean confidence, share that agrees, number of pairs


@dataclass(frozen=True)
class _Line:
    label: str
    bins: Bins
    index: int  # of its colour


def calibration(runs: Sequence[Run]) -> Drawing | None:
    """Accuracy against mean confidence in each bin of held-out pairs, of every train-rm run that is complete."""
    lines = [_Line(_label(run, bins), bins, run.index) for run in runs if (bins := _bins(run))]
    caption = (
        "Calibration of the reward models on held-out pairs: how often a model is right, against its confidence in the "
        "completion that it prefers, in bins of the confidence. Below the line it is overconfident. Bars are 95 % "
        "intervals; the error is the mean distance to the line, weighted by pairs."
    )
    axes = "confidence σ(|r(chosen) − r(rejected)|)", "share of pairs ranked correctly"
    return _draw(lines, "calibration", axes, caption)


def of_judges(judged: Sequence[Judged]) -> Drawing | None:
    """Agreement against mean confidence, of judgements with probabilities that were compared with known ones."""
    lines = [
        _Line(f"{j.name}: Brier {c['brier']:.3f}, error {c['error']:.3f}, {c['n']} comparisons", c["bins"], i)
        for i, j in enumerate(judged)
        if (c := j.calibration)
    ]
    caption = (
        "Calibration of the judge's probabilities against other judgements of the same comparisons, such as people's: "
        "the share of these for the candidate that the judge prefers (ties count half), against its confidence, in "
        "bins of the confidence. Below the line it is overconfident. Bars are 95 % intervals; the error is the mean "
        "distance to the line, weighted by comparisons."
    )
    axes = "the judge's confidence max(p, 1 − p)", "share of the others that agree"
    return _draw(lines, "judge-calibration", axes, caption)


def _draw(lines: Sequence[_Line], name: str, labels: tuple[str, str], caption: str) -> Drawing | None:
    if not lines:
        return None
    figure, axes = shared.axes()
    axes.plot([0.5, 1], [0.5, 1], color="#777777", linewidth=0.8, label="calibrated")
    for line in lines:
        confidence, accuracy, pairs = zip(*line.bins, strict=True)
        intervals = [wilson(a, int(n)) for a, n in zip(accuracy, pairs, strict=True)]
        errors = [
            [max(0.0, a - low) for a, (low, _) in zip(accuracy, intervals, strict=True)],
            [max(0.0, high - a) for a, (_, high) in zip(accuracy, intervals, strict=True)],
        ]
        style: dict[str, Any] = {"color": shared.colour(line.index), "marker": shared.marker(line.index)}
        style |= {"linestyle": shared.several_rounds(line.index), "markersize": 4, "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(confidence, accuracy, yerr=errors, label=line.label, **style)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    shared.legend(figure, axes)
    return Drawing(name, caption, figure)


def _bins(run: Run) -> Bins:
    """(mean confidence, accuracy, pairs) of each bin; none of another command, and of a run that is not complete."""
    return ((run.manifest or {}).get("metrics", {}).get("calibration") or []) if run.stage == "train-rm" else []


def _label(run: Run, bins: Bins) -> str:
    pairs = int(sum(n for _, _, n in bins))
    error = (run.manifest or {}).get("metrics", {}).get("eval/calibration_error")
    return f"{run.name}: " + (f"error {error:.3f}, " if error is not None else "") + f"{pairs} pairs"
