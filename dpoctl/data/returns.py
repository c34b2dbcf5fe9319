"""Completions with a return each, for offline reinforcement learning: with scores, or both sides of preferences."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..log import say
from .answers import Answer, answer_of, encode_answers
from .codec import Codec
from .counts import in_words
from .encode import Limits, within
from .gaps import sequence_of
from .readers import Rows, warn_of_skipped

_SIDES: dict[str, dict[str, float | None]] = {  # kind of rows -> field of a completion -> its return, None: the score
    "completions": {"completion": None},
    "preferences": {"chosen": 1.0, "rejected": -1.0},
}
_NO_SCORE = "field 'score': expected a number, got nothing"


@dataclass
class Episode:
    """A prompt and a completion: `sequence` (ids, start), perhaps with gaps; `value`: the completion's return."""

    sequence: tuple[Sequence[int], int]
    value: float
    line: Any = field(default=0, compare=False)  # where its row is


def encode_returns(rows: Rows, kind: str, codec: Codec, limits: Limits) -> tuple[list[Episode], dict[str, int]]:
    """(episodes, counts) of rows of `kind`: of completions the return is `score`; of preferences 1 and -1.

    A completion that is truncated keeps its return, which its last token then has. Counts: rows, completions,
    truncated, empty_dropped (an empty prompt or completion), duplicates, refused, special_text, chats, and from_ids and
    ids_not_used. Raises InputError for a row without a score (which is skipped where invalid rows are), and where no
    completion is left.
    """
    scored = _scored(rows) if kind == "completions" else range(len(rows.rows))
    sides = _SIDES[kind]
    found = [(answer_of(rows, i, name), value) for i in scored for name, value in sides.items()]
    answers = [answer for answer, _ in found]
    encoded = encode_answers(rows, codec, answers)
    counts = {"rows": len(rows.rows), "truncated": 0, "empty_dropped": 0} | rows.skipped
    counts |= encoded.counts | {"from_ids": 0}
    episodes: list[Episode] = []
    for n, (answer, value) in enumerate(found):
        if answer.row in encoded.refused:
            continue
        each = within(encoded, n, limits, codec)
        if not each:
            counts["empty_dropped"] += 1
            continue
        counts["truncated"] += each.cut
        counts["from_ids"] += answer.ids is not None
        value = float(rows.rows[answer.row]["score"]) if value is None else value
        sequence = sequence_of(each.prompt, each.completion, each.gaps)
        episodes.append(Episode(sequence, value, rows.lines[answer.row]))
    return episodes, _finished(rows, codec, answers, episodes, counts)


def _scored(rows: Rows) -> list[int]:
    """The rows with a score. Raises InputError for the first without one, unless invalid rows are skipped."""
    without = [i for i, row in enumerate(rows.rows) if row.get("score") is None]
    if without and not rows.skip_bad:
        hint = "dpoctl score adds it; make-prefs --completions-out writes completions with their scores"
        raise InputError(f"{rows.place(without[0])}: {_NO_SCORE}", hint)
    if without:
        warn_of_skipped(rows.path, len(rows.rows) - len(without), {_NO_SCORE: len(without)})
        rows.skipped[_NO_SCORE] = len(without)
    return sorted(set(range(len(rows.rows))) - set(without))


def _finished(
    rows: Rows, codec: Codec, answers: list[Answer], episodes: list[Episode], counts: dict[str, int]
) -> dict[str, int]:
    """All counts, which are logged. Raises InputError where there is no episode."""
    counts["special_text"] = codec.count_special([a.prompt, a.completion] for a in answers if a.ids is None)
    counts["chats"] = sum(answer.prompt.is_chat for answer in answers)
    counts["completions"] = len(episodes)
    counts["duplicates"] = len(episodes) - len({(e.sequence[1], *e.sequence[0]) for e in episodes})
    if not episodes:
        raise InputError(f"{rows.path}: no completions are left to train on", "check the rows and --max-length")
    if told := in_words(counts):
        say(f"{rows.path}: {told}")
    return counts
