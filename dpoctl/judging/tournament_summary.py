"""The metrics of a tournament: a score for each candidate, and a win rate for each pair."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import bradley_terry, statistics
from .bradley_terry import ELO, Place
from .summary import by_criterion, of_people, scores_of, summarise

_OF_ALL = ("n", "ties", "flips", "invalid", "invalid_reasons", "soft", "sure")  # what a summary of all pairs tells


def metrics_of(rows: Sequence[dict], names: Sequence[str], baseline: str | None) -> dict[str, Any]:
    """The scores of the candidates, best first, and the summary of each pair that was compared.

    `scores`: a candidate's score in log-odds (`outside` says why it has none), its interval, both on Elo's scale, the
    probability to win against the baseline, and its win rate over all its comparisons. `pairs`: the summary of a over
    b, and the win rate that their scores imply. Of several criteria all of this for each.
    """
    if not rows:
        return {}
    criteria = by_criterion(rows)
    if len(criteria) > 1:
        return {"by_criterion": {name: metrics_of(judged, names, baseline) for name, judged in criteria.items()}}
    scored = _scored(rows)
    at = None if baseline is None else list(names).index(baseline)
    places = bradley_terry.places(bradley_terry.wins_of(scored, names), at)
    of = dict(zip(names, places, strict=True))
    summary = {name: value for name, value in summarise(rows).items() if name in _OF_ALL}
    return _of_people(rows) | {
        "summary": summary,
        "scores": sorted((_shown(name, of[name], baseline, scored) for name in names), key=_rank),
        "pairs": [_pair(judged, of) for judged in by_pair(rows).values()],
    }


def _of_people(rows: Sequence[dict]) -> dict[str, Any]:
    """Each person's ties and invalid answers, and how people agree; empty where no person judged."""
    found = of_people(rows)
    if people := found.get("people"):
        shown = (*_OF_ALL, "both_bad")
        found["people"] = {who: {n: v for n, v in of.items() if n in shown} for who, of in people.items()}
    return found


def by_pair(rows: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """The rows of each pair of candidates (a, b)."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["a_of"], row["b_of"]), []).append(row)
    return found


def _scored(rows: Sequence[dict]) -> list[tuple[str, str, str, float]]:
    """(prompt, a, b, score of a) of each valid comparison."""
    return [(key[0], *key[-2:], score) for key, score in scores_of(rows).items()]


def _shown(name: str, place: Place, baseline: str | None, scored: Sequence[tuple[str, str, str, float]]) -> dict:
    won = [score if name == a else 1 - score for _, a, b, score in scored if name in (a, b)]
    prompts = [prompt for prompt, a, b, _ in scored if name in (a, b)]
    interval = None if place.low is None or place.high is None else [place.low, place.high]
    shown: dict[str, Any] = {
        "candidate": name,
        "score": place.score,
        "interval": interval,
        "elo": None if place.score is None else ELO * place.score,
        "elo_interval": interval and [ELO * value for value in interval],
        "win_rate": sum(won) / len(won) if won else None,
        "win_rate_interval": list(statistics.bootstrap(won, prompts)) if won else None,
        "n": len(won),
    }
    if baseline is not None and name != baseline and place.score is not None:
        shown["win_over_baseline"] = _probability(place.score)
        shown["win_over_baseline_interval"] = interval and [_probability(value) for value in interval]
    return shown | ({"outside": place.outside} if place.outside else {})


def _rank(shown: dict[str, Any]) -> tuple[int, float, float]:
    """By score; those above the others first, those below them and those apart last; by their win rates among them."""
    order = {bradley_terry.ABOVE: 0, "": 1, bradley_terry.BELOW: 2, bradley_terry.APART: 3}
    return order[shown.get("outside", "")], -(shown["score"] or 0.0), -(shown["win_rate"] or 0.0)


def _pair(rows: Sequence[dict], of: dict[str, Place]) -> dict[str, Any]:
    a, b = rows[0]["a_of"], rows[0]["b_of"]
    one, other = of[a].score, of[b].score
    implied = None if one is None or other is None else _probability(one - other)
    return {"a": a, "b": b} | summarise(rows) | {"implied": implied}


def _probability(difference: float) -> float:
    return float(bradley_terry.probability(np.float64(difference)))
