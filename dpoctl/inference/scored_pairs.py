"""Preference rows with a score of each side, and how often the chosen one is the higher."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ..data.columns import apply_columns, parse_columns
from ..data.fields import BadRow
from ..data.formats import rows_of
from ..outputs import accuracy
from .scorer_base import Scorer

SIDES = ("chosen", "rejected")
_OF_PROMPT = ("prompt_id", "prompt", "tools", "chat_template_kwargs", "prompt_ids", "tokenizer", "texts")
START: dict[str, Any] = {"chosen_sum": 0.0, "rejected_sum": 0.0, "by": {}}  # the counts before the first batch


def are_pairs(path: str | PathLike, columns: str | None) -> bool:
    """Whether a file's first row is a preference: it has both sides, and no text, completion or messages."""
    mapped = parse_columns(columns)
    for _, row in rows_of(path):
        if not isinstance(row, dict):  # unreadable, which the reader of the rows tells
            continue
        try:
            row = apply_columns(mapped, row)
        except BadRow:
            return False
        given = {name for name in (*SIDES, "text", "completion", "messages") if row.get(name) is not None}
        return given == set(SIDES)
    return False


def score_pairs(
    scorer: Scorer, rows: Sequence[dict[str, Any]], groups: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the rows with `chosen_score` and `rejected_score`, their counts); `groups` has the group of each row.

    Compared are the scorer's keys, since probabilities saturate. Raises InputError as `Scorer.score` does.
    """
    scores = scorer.score([_side(row, side) for row in rows for side in SIDES])
    chosen, rejected = scores.values[::2], scores.values[1::2]
    counts = {
        "chosen_sum": sum(chosen),
        "rejected_sum": sum(rejected),
        "by": accuracy.tally(scores.keys[::2], scores.keys[1::2], groups),
    }
    scored = [
        row | {"chosen_score": w, "rejected_score": l}
        for row, w, l in zip(rows, chosen, rejected, strict=True)  # noqa: E741
    ]
    return scored, counts


def _side(row: Mapping[str, Any], side: str) -> dict[str, Any]:
    """One side of a preference as a completion row, with the ids that it stores."""
    found = {name: row[name] for name in _OF_PROMPT if row.get(name) is not None} | {"completion": row[side]}
    stored = {"finish": row.get(f"{side}_finish"), "completion_ids": row.get(f"{side}_ids")}
    return found | {name: value for name, value in stored.items() if value is not None}
