"""Win rates against the sampling temperature and along training, one line a policy."""

from . import shared
from .collect import Judged


def against_temperature(judged: list[Judged]):
    return _figure(judged, "temperature", "sampling temperature", "wins-by-temperature",
                   "Win rate at each sampling temperature")  # fmt: skip


def against_step(judged: list[Judged]):
    return _figure(judged, "step", "updates", "wins-by-step", "Win rate along training")


def _figure(judged: list[Judged], by: str, label: str, name: str, what: str):
    """Win rates with 95 % intervals; the lines are set apart a little so that intervals do not hide each other."""
    lines = [(j, [s for s in getattr(j, f"by_{by}") if s["interval"]]) for j in judged]
    lines = [(j, points) for j, points in lines if points]
    if not lines:
        return None
    figure, axes = shared.axes()
    places = [s[by] for _, points in lines for s in points]
    gap = 0.012 * (max(places) - min(places))
    axes.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
    for i, (j, points) in enumerate(lines):
        rates = [s["win_rate"] for s in points]
        bars = [[r - s["interval"][0] for r, s in zip(rates, points, strict=True)],
                [s["interval"][1] - r for r, s in zip(rates, points, strict=True)]]  # fmt: skip
        at = [s[by] + gap * (i - (len(lines) - 1) / 2) for s in points]
        axes.errorbar(at, rates, yerr=bars, color=shared.COLOURS[i % 7], marker=shared.MARKERS[i % 7], markersize=5, capsize=2,
                      linestyle=shared.LINES[i // 7 % 4], elinewidth=0.8, label=j.name)  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_xlabel(label)
    axes.set_ylabel(f"win rate against {', '.join(dict.fromkeys(j.against for j, _ in lines))}")
    shared.legend(figure, axes)
    n = sorted({s["n"] for _, points in lines for s in points})
    sizes = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
    judges = ", ".join(dict.fromkeys(f"{j.judge} ({j.criterion})" for j, _ in lines))
    return name, f"{what}, judged by {judges}: n = {sizes} comparisons a point, bars are 95 % intervals.", figure
