"""Figures of tournaments: the scores with their intervals, and the win rates as a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import shared
from .shared import Drawing
from .tournaments import name_of, rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .collect import Contest

_CELL, _MARGIN = 1.0, 2.6  # inches of a cell of the heat map, and beside them
_LONG = 24  # characters of a name that fit beside the axes
_DARK = 0.5  # luminance of a cell below which its text is white


def drawings(contests: list[Contest]) -> list[Drawing]:
    """Both figures of each tournament that has a score."""
    found = []
    for i, contest in enumerate(contests):
        suffix = f"-{i + 1}" if len(contests) > 1 else ""
        if any(s["interval"] for s in contest.metrics["scores"]):
            found.append(_scores(contest, f"tournament-scores{suffix}"))
        if rates(contest.metrics):
            found.append(_matrix(contest, f"tournament-wins{suffix}"))
    return found


def _scores(contest: Contest, name: str) -> Drawing:
    """A line for each candidate that has a score, the best at the top."""
    shown = [s for s in contest.metrics["scores"] if s["score"] is not None]
    figure, axes = shared.axes(height=min(9.0, 1.4 + 0.42 * len(shown)))
    baseline = contest.metrics.get("baseline")
    for i, s in enumerate(shown):
        low, high = s["interval"] or (s["score"], s["score"])
        error = [[max(0.0, s["score"] - low)], [max(0.0, high - s["score"])]]
        axes.errorbar([s["score"]], [i], xerr=error, color=shared.colour(0), marker="o", markersize=6, capsize=3)
        axes.annotate(
            f"{s['score']:+.2f}", (s["score"], i), (0, 6), textcoords="offset points", fontsize=8, ha="center"
        )
    axes.axvline(0, color="#777777", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [_short(s["candidate"]) for s in shown])
    axes.set_ylim(len(shown) - 0.4, -0.7)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"Bradley-Terry score (log-odds{f' to beat {_short(baseline)}' if baseline else '; mean 0'})")
    left_out = [_short(s["candidate"]) for s in contest.metrics["scores"] if s["score"] is None]
    caption = (
        f"Bradley-Terry scores, judged by {contest.judged_by}. Bars are 95 % intervals, a bootstrap over prompts; a "
        "candidate wins with the logistic function of the difference of two scores."
    ) + (f" Without a finite score: {', '.join(left_out)}." if left_out else "")
    return Drawing(name, caption, figure)


def _matrix(contest: Contest, name: str) -> Drawing:
    """Purple where the row wins, orange where the column does."""
    names = [s["candidate"] for s in contest.metrics["scores"]]
    found = rates(contest.metrics)
    values = np.full((len(names), len(names)), np.nan)
    for (one, other), rate in found.items():
        values[names.index(one), names.index(other)] = rate["win_rate"]
    side = _CELL * len(names)
    figure, axes = shared.axes(width=side + _MARGIN, height=side + 1.2)
    image = axes.imshow(values, cmap="PuOr", vmin=0, vmax=1)
    for (one, other), rate in found.items():
        _write(axes, (names.index(other), names.index(one)), rate, _ink(image.cmap(rate["win_rate"])))
    axes.grid(visible=False)
    axes.set_xticks(range(len(names)), [_short(n) for n in names], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [_short(n) for n in names])
    figure.colorbar(image, ax=axes, shrink=0.8, label="win rate of the row over the column")
    caption = (
        f"Win rate of the row over the column, with its 95 % interval and the number of comparisons, judged by "
        f"{contest.judged_by}. Candidates in the order of their scores."
    )
    return Drawing(name, caption, figure)


def _write(axes: Axes, place: tuple[int, int], rate: dict, colour: str) -> None:
    low, high = rate["interval"]
    axes.text(*place, f"{rate['win_rate']:.2f}", ha="center", va="bottom", color=colour, fontsize=11)
    axes.text(*place, f"{low:.2f} to {high:.2f}\nn {rate['n']}", ha="center", va="top", color=colour, fontsize=7)


def _ink(background: tuple[float, ...]) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue, *_ = background
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < _DARK else "black"


def _short(name: str) -> str:
    name = name_of(name)
    return name if len(name) <= _LONG else f"…{name[1 - _LONG :]}"
