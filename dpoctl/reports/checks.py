"""What `judge --check` found, in plain words: the table on the terminal and in a report, and a figure of the biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..judging.check_pairs import INJECTED, PADDED, SHUFFLED, TRUNCATED
from . import shared
from .collect import CheckedJudge
from .shared import Drawing
from .tables import NONE, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "position": "position",
    "length": "length, at equal quality",
    "family": "its own family of models",
    SHUFFLED: "shuffled sentences",
    TRUNCATED: "truncated answer",
    PADDED: "padded answer",
    **{kind: f"injected {shown}" for kind, shown in zip(INJECTED, ('"answer A"', '"Preferred: B"'), strict=True)},
}
NOTE = (
    "Points are percentage points. A bias is found where its p-value, adjusted by Holm's method for all of the judge's "
    "tests, is below 5 %: of a judge without any bias at most one check in twenty finds one. What n can find is the "
    "effect that so many pairs show with a power of 80 %."
)


def table(metrics: dict[str, Any]) -> Rows:
    """One row for agreement, for stability and for each bias: what was measured, and the verdict in words."""
    rows = []
    if agreement := metrics.get("agreement"):
        rows.append(_agreement(agreement))
    if (stability := metrics.get("stability")) and stability["n"]:
        measured = f"{_percent(stability['value'])} change"
        rows.append(["stability", measured, _interval(stability, 1), str(stability["n"]), NONE, _stable(stability)])
    rows += [_bias(finding) for finding in metrics["findings"]]
    if metrics["invalid"]:
        rows.append(["invalid answers", _percent(metrics["invalid"]), NONE, NONE, NONE, "left out of all rows above"])
    return Rows(["check", "measured", "95 %", "n", "p (Holm)", "verdict"], rows)


def conclusion(metrics: dict[str, Any]) -> str:
    """One sentence: which biases were found."""
    findings = metrics["findings"]
    found = [_NAMES[f["name"]] for f in findings if f["found"]]
    if not findings:
        return "no bias could be tested"
    if found:
        return f"found: {', '.join(found)} (at a family-wise error rate of 5 %, {len(findings)} tests)"
    if all(f["can_find"] is None for f in findings):
        return "too few pairs to find a bias"
    return f"no bias found in {len(findings)} tests; smaller ones than the table says may be there"


def _agreement(found: dict[str, Any]) -> list[str]:
    kappa = f"kappa {found['kappa']:.2f} ({found['kappa_low']:.2f} to {found['kappa_high']:.2f})"
    if found["kappa_low"] <= 0:
        words = f"{kappa}: no agreement beyond chance is shown"
    else:
        words = f"{kappa}; {_percent(found['both_orders'])} in both orders"
    if "without_ties" in found:
        words += f"; {_percent(found['without_ties'])} without ties"
    measured = f"{_percent(found['value'])} agree"
    return ["agreement", measured, _interval(found, 1), str(found["n"]), NONE, words]


def _stable(found: dict[str, Any]) -> str:
    if found["high"] < 0.05:
        return "verdicts repeat"
    return f"one verdict in {1 / found['value']:.0f} changes when it is asked again" if found["value"] else "none seen"


def _bias(finding: dict[str, Any]) -> list[str]:
    name = finding["name"]
    if "excess" in finding:
        measured, interval = f"{_percent(finding['value'])} fooled", _interval(finding, 1)
    else:
        measured, interval = _points(finding["value"]), _interval(finding, 0)
    p = "< 0.001" if finding["p_holm"] < 0.001 else f"{finding['p_holm']:.3f}"
    return [_NAMES[name], measured, interval, str(finding["n"]), p, _verdict(finding)]


def _verdict(f: dict[str, Any]) -> str:
    """The verdict on a bias in words, with what so many pairs can find where none is found."""
    name, found = f["name"], f["found"]
    if name == "position":
        words = f"BIAS: prefers the {'first' if f['value'] > 0 else 'second'} answer" if found else _none(f)
        return f"{words}; {_percent(f['flips'])} of pairs change with the order"
    if name == "length":
        more = f"per {f['words']:.0f} words more"
        return (
            f"BIAS: prefers {'longer' if f['value'] > 0 else 'shorter'} answers ({more})" if found else _none(f, more)
        )
    if name == "family":
        words = f"BIAS: {'favours' if f['value'] > 0 else 'disfavours'} {f['family']} models" if found else _none(f)
        favoured = f"; {_percent(f['wrong_in_favour'])} of {f['wrong']} wrong verdicts favour {f['family']}"
        return words + (favoured if f["wrong"] else "")
    excess = _points(f["excess"])
    if name == PADDED:
        return f"FOOLED: {excess} above half for the padded copy" if found else _none(f, "above half")
    if name in INJECTED:
        return f"FOOLED: {excess} by the instruction" if found else _none(f)
    return f"FOOLED: {excess} to the errors on the known pairs" if found else _none(f, "above the known pairs")


def _none(f: dict[str, Any], of: str = "") -> str:
    """That nothing is found, and what could be; a small p-value of this test alone is told.

    More than is there to be found is not promised: half of the verdicts for positions and padded copies, else all.
    """
    alone = f"; p of this test alone is {f['p']:.3f}" if f["p"] < 0.05 else ""
    if f["can_find"] is None or f["can_find"] >= (0.5 if f["name"] in ("position", PADDED) else 1):
        return f"too few pairs to find anything (n = {f['n']})"
    what = "not fooled more often" if "excess" in f else "no bias found"
    return f"{what} (n = {f['n']} can find {_least(f['can_find'])}{f' {of}' if of else ''}){alone}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _least(value: float) -> str:
    """The effect that can be found, rounded up: what is promised holds."""
    points = 100 * value
    return f"{points:.1f} points" if points < 1 else f"{-int(-points // 1)} points"


def _interval(found: dict[str, Any], as_share: int) -> str:
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{low:.1f} to {high:.1f}" if as_share else f"{low:+.1f} to {high:+.1f}"


# --- the figure


def biases(checked: Sequence[CheckedJudge]) -> Drawing | None:
    """Every tested bias of every judge in points, with its 95 % interval; filled where it is found."""
    shown = [judge for judge in checked if judge.metrics["findings"]]
    if not shown:
        return None
    names = [name for name in _NAMES if any(f["name"] == name for judge in shown for f in judge.metrics["findings"])]
    figure, axes = shared.axes(8.4)
    axes.axvline(0, color="#777777", linewidth=0.8)
    for i, judge in enumerate(shown):
        shift = 0.6 / len(shown) * (i - (len(shown) - 1) / 2)
        _draw(axes, judge, i, {name: row + shift for row, name in enumerate(names)})
    axes.set_yticks(range(len(names)), [_NAMES[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("points")
    shared.legend(figure, axes)
    caption = (
        "Biases of the judges, with 95 % intervals; a filled marker is a bias that was found. Position: verdicts for "
        "the first answer above half. Length: what one standard deviation more words adds beside the known answer. "
        "Shuffled, truncated, injected: errors above those on the known pairs. Padded: verdicts for the padded copy "
        "above half."
    )
    return Drawing("judge-biases", caption, figure)


def _draw(axes: Axes, judge: CheckedJudge, i: int, places: dict[str, float]) -> None:
    style: dict[str, Any] = {"color": shared.colour(i), "marker": shared.marker(i), "linestyle": "none"}
    for finding in judge.metrics["findings"]:
        keys = ("excess", "excess_low", "excess_high") if "excess" in finding else ("value", "low", "high")
        value, low, high = (100 * finding[key] for key in keys)
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        drawn = style | {"markersize": 6, "capsize": 2, "elinewidth": 1}
        filled = shared.colour(i) if finding["found"] else "#ffffff"
        axes.errorbar([value], [places[finding["name"]]], xerr=errors, markerfacecolor=filled, **drawn)
    axes.plot([], [], label=f"{judge.name}: {judge.title}", **style)
