"""From judgements to a summary: wins, ties, flips with the order, what could not be parsed, lengths."""

from collections.abc import Sequence
from typing import Any

from . import statistics

Key = tuple[str, int, float | None, int | None]


def key_of(row: dict) -> Key:
    """What names a comparison: prompt_id and k of the candidates, their temperature and training step."""
    return row["prompt_id"], row["k"], row.get("temperature"), row.get("step")


def outcomes(rows: Sequence[dict]) -> dict[Key, str]:
    """One outcome a comparison: `a`, `b`, `tie`, `invalid`.

    Judged in both orders, a win counts where both agree, else it is a tie; one order that could not be parsed makes the
    comparison invalid.
    """
    verdicts: dict[Key, list[str]] = {}
    for row in rows:
        verdicts.setdefault(key_of(row), []).append(row["verdict"])
    return {
        key: "invalid" if "invalid" in own else own[0] if len(set(own)) == 1 else "tie" for key, own in verdicts.items()
    }


def score_of(outcome: str) -> float:
    """1 for a win of a, 0 for one of b, 1/2 for a tie."""
    return {"a": 1.0, "tie": 0.5, "b": 0.0}[outcome]


def summarise(rows: Sequence[dict]) -> dict[str, Any]:
    """Win rate of a over b with a 95 % interval, and all that belongs beside it.

    The interval is Wilson's where each prompt was judged once, else a bootstrap over prompts. `flips`: the share of
    comparisons, valid in both orders, whose verdict depends on the order. Lengths are in words.
    """
    found = outcomes(rows)
    valid = {key: o for key, o in found.items() if o != "invalid"}
    scores = {key: score_of(o) for key, o in valid.items()}
    n = len(valid)
    texts = {key_of(row): (row["a"], row["b"]) for row in rows}
    lengths = {key: tuple(len(text.split()) for text in pair) for key, pair in texts.items()}
    both = [(r, s) for r, s in _pairs(rows) if "invalid" not in (r["verdict"], s["verdict"])]
    rate = sum(scores.values()) / n if n else None
    interval: tuple[float, float] | None = None
    if n:
        prompts = [prompt for prompt, *_ in scores]
        once = len(set(prompts)) == len(prompts)
        interval = statistics.wilson(rate, n) if once else statistics.bootstrap(list(scores.values()), prompts)
    return {
        "n": n,
        "wins": sum(o == "a" for o in valid.values()),
        "ties": sum(o == "tie" for o in valid.values()),
        "losses": sum(o == "b" for o in valid.values()),
        "win_rate": rate,
        "interval": list(interval) if interval else None,
        "flips": sum(r["verdict"] != s["verdict"] for r, s in both) / len(both) if both else None,
        "invalid": sum(row["verdict"] == "invalid" for row in rows) / len(rows),
        "length_a": sum(a for a, _ in lengths.values()) / len(lengths),
        "length_b": sum(b for _, b in lengths.values()) / len(lengths),
        "length_controlled": statistics.length_controlled(
            [scores[key] for key in scores], [lengths[key][0] - lengths[key][1] for key in scores]
        ),
    }


def summaries_by(name: str, rows: Sequence[dict]) -> list[dict[str, Any]]:
    """A summary for each `temperature` or `step` of the candidates, where there are several; by rising value."""
    found = sorted({row[name] for row in rows if row.get(name) is not None})
    if len(found) < 2:
        return []
    return [{name: value} | summarise([row for row in rows if row.get(name) == value]) for value in found]


def _pairs(rows: Sequence[dict]) -> list[tuple[dict, dict]]:
    """The two orders of each comparison that has both."""
    by_key: dict[Key, list[dict]] = {}
    for row in rows:
        by_key.setdefault(key_of(row), []).append(row)
    return [(own[0], own[1]) for own in by_key.values() if len(own) == 2]
