"""Running counts of a command that writes rows: summed over batches and shards, they give the manifest's metrics."""

from collections.abc import Callable
from typing import Any

from . import accuracy

BINS = 10  # bins of make-prefs' histogram of scores, from 0 to 1


def add(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The sum of two dictionaries of counts, name by name and recursively."""
    names = one | other
    return {
        name: add(one.get(name, {}), other.get(name, {}))
        if isinstance(names[name], dict)
        else one.get(name, 0) + other.get(name, 0)
        for name in names
    }


def of_sample(counts: dict[str, Any]) -> dict[str, Any]:
    """Completions kept and sampled, and the fraction of those kept that ended with an end token."""
    return {name: counts[name] for name in ("completions", "sampled")} | {
        "ended": counts["ended"] / max(1, counts["completions"])
    }


def of_score(counts: dict[str, Any]) -> dict[str, Any]:
    """Rows scored and their mean score; of pairs that of each side, and how often the chosen one is the higher."""
    if "by" in counts:
        sides = {
            f"mean_{side}_score": counts[f"{side}_sum"] / max(1, counts["rows"]) for side in ("chosen", "rejected")
        }
        return {"rows": counts["rows"]} | sides | accuracy.metrics_of(counts["by"])
    return {"rows": counts["rows"], "mean_score": counts["sum"] / max(1, counts["rows"])}


def of_make_prefs(counts: dict[str, Any]) -> dict[str, Any]:
    """Pairs or labels made and left out, by reason; mean length (tokens) of samples that have ids, and which ended.

    Where scores decide also the mean score and its histogram, where a judge or votes do the invalid pairs.
    """
    names = (
        *("prompts", "samples", "pairs", "desirable", "undesirable"),
        *("ties", "below_margin", "duplicates", "not_picked", "invalid"),
    )
    shown: dict[str, Any] = {name: counts[name] for name in names if name in counts}
    if "score_sum" in counts:
        shown["mean_score"] = counts["score_sum"] / max(1, counts["samples"])
    for name, total, of in (("mean_length", "tokens", "with_ids"), ("ended", "ended", "with_finish")):
        known = counts.get(of, counts["samples"])
        shown[name] = None if counts["samples"] and not known else counts[total] / max(1, known)
    if "score_sum" in counts:
        shown["score_histogram"] = [counts["histogram"].get(str(i), 0) for i in range(BINS)]
    return shown | _score_type(counts)


def _score_type(counts: dict[str, Any]) -> dict[str, Any]:
    """What the scores are (prob, log-odds, reward ...), where it was counted: a loss that reads them asks for it."""
    return {"score_type": ", ".join(sorted(counts["score_types"]))} if counts.get("score_types") else {}


def of_evaluate(counts: dict[str, Any]) -> dict[str, Any]:
    """Rows written."""
    return {"rows": counts["rows"]}


METRICS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {  # not judge: its summary needs the rows
    "sample": of_sample,
    "score": of_score,
    "make-prefs": of_make_prefs,
    "evaluate": of_evaluate,
}
