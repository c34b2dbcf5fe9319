"""Win rates against the sampling temperature and along training, one line for each policy."""

from ..judging.summary import Summary
from . import shared
from .collect import Judged
from .shared import Drawing


def against_temperature(judged: list[Judged]) -> Drawing | None:
    return _draw(
        [(j, j.by_temperature) for j in judged],
        "temperature",
        "sampling temperature",
        "wins-by-temperature",
        "Win rate at each sampling temperature",
    )


def against_step(judged: list[Judged]) -> Drawing | None:
    return _draw([(j, j.by_step) for j in judged], "step", "updates", "wins-by-step", "Win rate along training")


def _draw(judged: list[tuple[Judged, list[Summary]]], by: str, label: str, name: str, title: str) -> Drawing | None:
    """Win rates with 95 % intervals; the lines are shifted a little so that intervals do not hide each other."""
    lines = [(j, [s for s in summaries if s["interval"]]) for j, summaries in judged]
    lines = [(j, points) for j, points in lines if points]
    if not lines:
        return None
    figure, axes = shared.axes()
    positions = [s[by] for _, points in lines for s in points]
    gap = 0.012 * (max(positions) - min(positions))
    axes.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
    for i, (j, points) in enumerate(lines):
        rates = [s["win_rate"] for s in points]
        below = [s["win_rate"] - s["interval"][0] for s in points]
        above = [s["interval"][1] - s["win_rate"] for s in points]
        axes.errorbar(
            [s[by] + gap * (i - (len(lines) - 1) / 2) for s in points],
            rates,
            yerr=[below, above],
            color=shared.colour(i),
            marker=shared.marker(i),
            markersize=5,
            capsize=2,
            linestyle=shared.several_rounds(i),
            elinewidth=0.8,
            label=j.name,
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel(label)
    axes.set_ylabel(f"win rate against {', '.join(dict.fromkeys(j.against for j, _ in lines))}")
    shared.legend(figure, axes)
    sizes = shared.count_range({s["n"] for _, points in lines for s in points})
    judges = ", ".join(dict.fromkeys(f"{j.judge} ({j.criterion})" for j, _ in lines))
    caption = f"{title}, judged by {judges}: n = {sizes} comparisons per point; bars are 95 % intervals."
    return Drawing(name, caption, figure)
