"""The table of grades (judge --scale), on the terminal and in a report."""

from collections.abc import Iterable
from typing import Any

from .. import log
from ..judging.grades import Summary
from . import tables
from .collect import Graded
from .tables import NONE, Rows

_HEAD = ["mean of 1 to 10", "95 %", "n", "invalid", "words", "grades given"]


def show(options: dict[str, Any], out: str, metrics: dict[str, Any], caption: str = "") -> None:
    """Print judge's metrics on stdout with a caption, and what else is to be known as log lines."""
    named: dict[str, Summary] = {}
    for name, summary in metrics["grades"].items():
        named[name] = summary
        named |= {f"  {by} {s[by]:g}": s for by in ("temperature", "step") for s in summary.get(f"by_{by}", ())}
    named |= {"canary": metrics["canary"]} if "canary" in metrics else {}
    rows = [[name, *_cells(summary)] for name, summary in named.items()]
    tables.show(Rows(["", *_HEAD], rows), f"Grades, criterion {options['criterion']}", caption=caption)
    for name, summary in named.items():
        if reasons := summary.get("invalid_reasons"):
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            tell = log.warn if summary["invalid"] > tables.MANY_INVALID else log.say
            tell(f"{name.strip()}: {summary['invalid']:.1%} of the grades are invalid: {counted}; see `raw` in {out}")
    if difference := metrics.get("difference"):
        one, other = metrics["grades"]
        interval = f"{difference['difference']:+.2f} ({difference['low']:+.2f} to {difference['high']:+.2f})"
        log.say(f"{one} less {other}: {interval}, p {difference['p']:.3f}, {difference['n']} prompts")


def table(graded: Iterable[Graded]) -> Rows:
    """One row for each policy and criterion."""
    return Rows(["policy", "criterion", *_HEAD], [[g.name, g.criterion, *_cells(g.summary)] for g in graded])


def _cells(summary: Summary) -> list[str]:
    interval = summary["interval"]
    return [
        NONE if summary["mean"] is None else f"{summary['mean']:.2f}",
        f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else NONE,
        str(summary["n"]),
        f"{summary['invalid']:.3f}",
        f"{summary['length']:.1f}",
        ", ".join(f"{count} x {grade}" for grade, count in summary["counts"].items()) or NONE,
    ]
