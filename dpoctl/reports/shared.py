"""What all figures share: colours, markers, axes and the position of the legend."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the palette of Okabe and Ito, distinguishable with colour blindness; markers and line styles distinguish in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":")
HEIGHT = 4.4  # inches


class Drawing(NamedTuple):
    """A figure that is not saved yet; `name` becomes its file name."""

    name: str
    caption: str
    figure: Figure


def axes(width: float = 7.2, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; `width` and `height` in inches."""
    figure = _figure(width, height)
    return figure, figure.subplots()


def two_axes(width: float = 8.4) -> tuple[Figure, Axes, Axes]:
    """A figure with two pairs of axes side by side; `width` in inches."""
    figure = _figure(width)
    left, right = figure.subplots(1, 2)
    return figure, left, right


def _figure(width: float, height: float = HEIGHT) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Figure, axes: Axes) -> None:
    """The legend, outside the axes so that it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 3 if len(labels) > 6 else 2
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def line(i: int) -> str:
    return LINES[i % len(LINES)]


def several_rounds(i: int) -> str:
    """The line style of series i where each colour is used once with a style before the next style begins."""
    return line(i // len(COLOURS))


def count_range(counts: set[int]) -> str:
    """`300`, or `100 to 300` where the points of a figure differ."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
