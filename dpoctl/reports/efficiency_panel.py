"""The panel of efficiency against reward, beside the reward-KL plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import shared
from .efficiency import Curve, Efficiency, efficiency
from .origins import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOM = 1.15  # of the highest point below the upper edge
CAPTION = (
    " Right: efficiency, the share of a policy's KL that the optimum needs for the same reward; the optimum has 100 %. "
    "Points with an arrow are lower bounds: their reward is beyond the optimum's samples, or their KL is a bound. "
    "Points whose error is above half of their value are left out."
)


class Measured(NamedTuple):
    """A point with its efficiency."""

    point: Point
    found: Efficiency

    @property
    def value(self) -> float:
        return self.found.value or 0.0

    @property
    def is_bound(self) -> bool:
        return self.found.at_least or self.point["method"] == "best-of-n"


class Series(NamedTuple):
    """A line of the panel: colour and marker number `i`, line style, points in order."""

    i: int
    style: str
    points: list[Measured]


def measured(points: Sequence[Point], curves: Sequence[Curve]) -> list[Measured]:
    """The points that have an efficiency which is more than noise."""
    found = [Measured(p, efficiency(p, curves)) for p in points]
    return [m for m in found if m.found.value and (m.is_bound or m.found.error <= m.value / 2)]


def draw(axes: Axes, series: Sequence[Series], best_of_n: Sequence[Measured], reward: str) -> None:
    """Draw the panel; `reward` is the label of its horizontal axis."""
    for i, style, points in series:
        _line(axes, points, shared.colour(i), shared.marker(i), style)
    _line(axes, best_of_n, "#777777", "*", ":")
    every = [m.value for _, _, points in series for m in points] + [m.value for m in best_of_n]
    top = max(every)
    if top > 1 / _ROOM:
        axes.axhline(1.0, color="#000000", linewidth=2)
    axes.set_ylim(0, top * _ROOM)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel(reward)
    axes.set_ylabel("efficiency: KL of the optimum / KL")


def _line(axes: Axes, points: Sequence[Measured], colour: str, marker: str, style: str) -> None:
    if not points:
        return
    axes.plot(
        [m.point["reward"] for m in points], [m.value for m in points], color=colour, linestyle=style, linewidth=1.1
    )
    for m in points:
        error: Any = {"xerr": m.point.get("reward_se"), "elinewidth": 0.6, "color": colour, "marker": marker}
        if m.is_bound:  # an arrow of a fixed length in place of a bar
            axes.errorbar(m.point["reward"], m.value, markersize=4.5, markerfacecolor="white", **error)
            axes.annotate(
                "",
                (m.point["reward"], m.value),
                xytext=(0, 14),
                textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": colour, "linewidth": 0.9},
            )
        else:
            axes.errorbar(m.point["reward"], m.value, yerr=m.found.error, markersize=4.5, **error)
