"""Tournaments as tables: the candidates' scores, and the matrix of win rates; what is told beside them."""

from collections.abc import Sequence
from typing import Any

from .. import log
from ..judging.bradley_terry import ABOVE, APART, BELOW
from ..judging.statistics import wilson
from . import tables
from .tables import NONE, Rows

_WITHOUT_SCORE = {ABOVE: "+∞", BELOW: "−∞", APART: NONE}  # noqa: RUF001 (a minus sign)
_WHY = {
    ABOVE: "no finite score: they won every comparison with the candidates that have one",
    BELOW: "no finite score: they lost every comparison with the candidates that have one",
    APART: "no score: no comparison connects them with the candidates that have one",
}


def show(metrics: dict[str, Any], title: str, caption: str) -> None:
    """Print the scores and the matrix on stdout, and warnings as log lines."""
    for name, of_criterion in metrics.get("by_criterion", {}).items():
        show({"baseline": metrics["baseline"]} | of_criterion, f"{title}, {name}", caption)
    if "scores" not in metrics:  # of several criteria, or a shard without comparisons
        return
    tables.show(scores(metrics), f"Bradley-Terry scores of {title}", caption=caption)
    tables.show(matrix(metrics), "Win rate of the row over the column, with its 95 % interval", caption=caption)
    for text in told(metrics):
        log.warn(text)


def scores(metrics: dict[str, Any]) -> Rows:
    """A row for each candidate, best first."""
    baseline = metrics.get("baseline")
    rate = "win rate" if baseline is None else f"wins over {name_of(baseline)}"
    found = [_row(s, baseline) for s in metrics["scores"]]
    return Rows(["candidate", "score", "95 %", "Elo", "95 %", rate, "95 %", "n"], found)


def _row(s: dict[str, Any], baseline: str | None) -> list[str]:
    rate, interval = s["win_rate"], s["win_rate_interval"]
    if baseline is not None and not s.get("outside"):
        rate, interval = s.get("win_over_baseline"), s.get("win_over_baseline_interval")
    if baseline == s["candidate"]:
        rate = interval = None
    return [
        name_of(s["candidate"]),
        _WITHOUT_SCORE[s["outside"]] if s.get("outside") else f"{s['score']:+.2f}",
        _interval(s["interval"], "+.2f"),
        NONE if s["elo"] is None else f"{s['elo']:+.0f}",
        _interval(s["elo_interval"], "+.0f"),
        NONE if rate is None else f"{rate:.3f}",
        _interval(interval, ".3f"),
        str(s["n"]),
    ]


def _interval(interval: Sequence[float] | None, digits: str) -> str:
    return f"{interval[0]:{digits}} to {interval[1]:{digits}}" if interval else NONE


def matrix(metrics: dict[str, Any]) -> Rows:
    """Win rates of each candidate over each other one, in the order of their scores: rate, interval and n in a cell."""
    names = [s["candidate"] for s in metrics["scores"]]
    found = rates(metrics)
    rows = [[name_of(one), *(_cell(found.get((one, other))) for other in names)] for one in names]
    return Rows(["", *map(name_of, names)], rows)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return NONE
    return f"{found['win_rate']:.3f}\n{_interval(found['interval'], '.2f')}\nn {found['n']}"


def rates(metrics: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(one, other) -> `win_rate`, `interval` and `n` of one over other, for every pair with a valid comparison."""
    found = {}
    for pair in metrics["pairs"]:
        if pair["win_rate"] is None:
            continue
        rate, n = pair["win_rate"], pair["n"]
        low, high = pair["interval"]
        found[pair["a"], pair["b"]] = {"win_rate": rate, "interval": (low, high), "n": n}
        found[pair["b"], pair["a"]] = {"win_rate": 1 - rate, "interval": (1 - high, 1 - low), "n": n}
    return found


def told(metrics: dict[str, Any]) -> list[str]:
    """Which candidates have no score, and which pairs contradict the scores."""
    texts = []
    for outside, why in _WHY.items():
        if names := [name_of(s["candidate"]) for s in metrics["scores"] if s.get("outside") == outside]:
            texts.append(f"{', '.join(names)}: {why}")
    for pair in metrics["pairs"]:
        if _contradicts(pair):
            texts.append(
                f"{name_of(pair['a'])} over {name_of(pair['b'])}: the win rate is {pair['win_rate']:.3f}, the scores "
                f"imply {pair['implied']:.3f}: one score for each candidate does not describe these comparisons"
            )
    return texts


def _contradicts(pair: dict[str, Any]) -> bool:
    """Whether the win rate that the scores imply is farther away than twice the interval's width allows.

    The interval is at least Wilson's: a bootstrap of wins alone has no width.
    """
    if pair["implied"] is None or pair["interval"] is None:
        return False
    rate = pair["win_rate"]
    low, high = zip(pair["interval"], wilson(rate, pair["n"]), strict=True)
    return not 2 * min(low) - rate <= pair["implied"] <= 2 * max(high) - rate


def name_of(candidate: str) -> str:
    """A candidate as tables show it: files named as in the recipes lose their prefix (samples.dpo)."""
    return candidate.removeprefix("samples.").removeprefix("scored.")
