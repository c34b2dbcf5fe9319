"""Prompts and completions of rows to token ids, each distinct text encoded once."""

import json
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError
from .readers import Rows
from .schema import shape_of
from .tokens import Text, encode_completions, encode_prompts, eos_id, fingerprint, interned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

V = TypeVar("V")


@dataclass
class Answer:
    """A completion of a row's prompt, both as text or messages. `finished`: it ended with EOS.

    `prompt_ids` and `ids` are those stored in the row, None where there are none.
    """

    row: int
    prompt: Text
    completion: Text
    finished: bool
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None


def answer_of(rows: Rows, i: int, field: str | None) -> Answer:
    """Row i's prompt and answer: its `field`, by default its completion or last message.

    Raises InputError naming file, line and field where the row lacks one of them.
    """
    row = rows.rows[i]
    if field is None and shape_of(row) == "messages":
        return Answer(i, row["messages"][:-1], row["messages"][-1:], row.get("finish") != "length")
    field = field or "completion"
    for needed in ("prompt", field):
        if row.get(needed) is None:
            hint = "--field chosen trains on the preferred completions" if row.get("chosen") is not None else ""
            raise InputError(f"{rows.place(i)}: field '{needed}': expected text, got nothing", hint)
    prefix = "" if field == "completion" else f"{field}_"
    finished = row.get(f"{prefix}finish") != "length"
    return Answer(i, row["prompt"], row[field], finished, row.get("prompt_ids"), row.get(f"{field}_ids"))


def encode_answers(
    rows: Rows, tokenizer: "PreTrainedTokenizerBase", answers: list[Answer]
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt ids of each answer, completion ids of each answer), EOS included where the answer is finished.

    Stored ids are used where the row's tokenizer is this one, and removed from the answer where it is not.
    """
    _keep_stored_ids(rows, tokenizer, answers)
    prompt_ids = _encode_prompts(rows, tokenizer, answers)
    return prompt_ids, _encode_completions(rows, tokenizer, answers, prompt_ids)


def place_of(rows: Rows, answer: Answer) -> str:
    """File and line of an answer's row, for a message."""
    return rows.place(answer.row)


def _keep_stored_ids(rows: Rows, tokenizer: "PreTrainedTokenizerBase", answers: list[Answer]) -> None:
    stored = any("tokenizer" in rows.rows[answer.row] for answer in answers)
    tokenizer_id = fingerprint(tokenizer) if stored else None
    for answer in answers:
        if tokenizer_id is None or rows.rows[answer.row].get("tokenizer") != tokenizer_id:
            answer.prompt_ids = answer.ids = None
        else:
            answer.prompt_ids = answer.prompt_ids and interned(answer.prompt_ids)
            answer.ids = answer.ids and interned(answer.ids)


def _encode_prompts(rows: Rows, tokenizer: "PreTrainedTokenizerBase", answers: list[Answer]) -> list[list[int]]:
    distinct = _first_of_each((_key(answer.prompt), answer) for answer in answers if answer.prompt_ids is None)
    firsts = list(distinct.values())
    encoded = encode_prompts(tokenizer, [first.prompt for first in firsts], lambda n: place_of(rows, firsts[n]))
    ids_of = dict(zip(distinct, encoded, strict=True))
    return [ids_of[_key(a.prompt)] if a.prompt_ids is None else a.prompt_ids for a in answers]


def _encode_completions(
    rows: Rows, tokenizer: "PreTrainedTokenizerBase", answers: list[Answer], prompt_ids: list[list[int]]
) -> list[list[int]]:
    eos = eos_id(tokenizer)
    keys = [
        (_key(answer.prompt), *prompt, _key(answer.completion), answer.finished)
        for answer, prompt in zip(answers, prompt_ids, strict=True)
    ]
    distinct = _first_of_each((keys[n], n) for n, answer in enumerate(answers) if answer.ids is None)
    firsts = list(distinct.values())
    encoded = encode_completions(
        tokenizer,
        [answers[n].prompt for n in firsts],
        [answers[n].completion for n in firsts],
        [prompt_ids[n] for n in firsts],
        [answers[n].finished for n in firsts],
        lambda n: place_of(rows, answers[firsts[n]]),
    )
    ids_of = dict(zip(distinct, encoded, strict=True))
    return [
        ids_of[key] if answer.ids is None else _with_eos(answer.ids, answer.finished, eos)
        for answer, key in zip(answers, keys, strict=True)
    ]


def _with_eos(ids: list[int], finished: bool, eos: int) -> list[int]:
    return ids + [eos] if finished and ids[-1:] != [eos] else ids


def _first_of_each(items: Iterable[tuple[Hashable, V]]) -> dict[Hashable, V]:
    """The first value of each key."""
    found: dict[Hashable, V] = {}
    for key, value in items:
        found.setdefault(key, value)
    return found


def _key(value: Text) -> Hashable:
    return value if isinstance(value, str) else ("messages", json.dumps(value, sort_keys=True))
