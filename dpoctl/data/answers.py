"""Prompts and completions of rows to token ids, each distinct text encoded once."""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..errors import InputError
from ..log import warn
from .chats import Prompt, Refusal, Text, prompt_of
from .codec import Codec, Completion
from .gaps import Gaps
from .readers import Rows, warn_of_skipped
from .schema import shape_of
from .stored import exchanged, has_ids, stored_completion, stored_prompt

V = TypeVar("V")


@dataclass
class Answer:
    """A completion of a row's prompt. `finished`: it ended with an end token, or is taken to end there.

    `prompt_ids` and `ids` are those stored in the row, None where there are none or they are not for these texts.
    """

    row: int
    prompt: Prompt
    completion: Text
    finished: bool
    name: str = ""  # the row's field, empty for messages
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None


@dataclass
class Encoded:
    """The ids of each answer's prompt and completion, and the completion's gaps; empty for a row in `refused`.

    `edited`: rows whose stored ids were not used because a text is not the one that they were made for. `in_thought`:
    rows with an answer that is part of a thought that its prompt opens, all of it.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    gaps: list[Gaps]
    refused: dict[int, Refusal] = field(default_factory=dict)  # by row
    edited: int = 0
    in_thought: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """What is counted of the rows; answers within a thought only where there are some."""
        found = {"refused": len(self.refused), "ids_not_used": self.edited}
        return found | ({"in_thought": self.in_thought} if self.in_thought else {})


def answers_of(rows: Rows, i: int, field: str | None, turns: str = "last") -> list[Answer]:
    """Row i's prompt and answer: its `field`, by default its completion or its messages' answers.

    `turns`: of messages, "all" takes every answer of the assistant but one that opens the dialogue, "last" the last.
    Raises InputError naming file, line and field where the row lacks one of them.
    """
    row = rows.rows[i]
    if field is None and shape_of(row) == "messages":
        messages, finished = row["messages"], row.get("finish") != "length"
        last = len(messages) - 1
        ends = [n for n in range(1, last + 1) if messages[n]["role"] == "assistant"] if turns == "all" else [last]
        return [
            Answer(i, replace(prompt_of(row, messages[:n]), closed=True), messages[n : n + 1], finished or n < last)
            for n in ends
        ]
    return [answer_of(rows, i, field or "completion")]


def answer_of(rows: Rows, i: int, name: str) -> Answer:
    """Row i's prompt and its completion `name`. Raises InputError where the row lacks one of them."""
    row = rows.rows[i]
    for needed in ("prompt", name):
        if row.get(needed) is None:
            hint = "--field chosen trains on the preferred completions" if row.get("chosen") is not None else ""
            raise InputError(f"{rows.place(i)}: field '{needed}': expected text, got nothing", hint)
    finish = "finish" if name == "completion" else f"{name}_finish"
    return Answer(i, prompt_of(row), row[name], row.get(finish) != "length", name)


def encode_answers(
    rows: Rows, codec: Codec, answers: list[Answer], refused: dict[int, Refusal] | None = None
) -> Encoded:
    """The ids of answers, the end token included where an answer is finished.

    Ids stored in a row are used where they are this tokenizer's and were made for the row's texts. A chat that the
    template refuses is an error, naming file and line; where invalid rows are skipped, it is counted with them, and so
    are the rows already `refused`.
    """
    edited = _take_stored(rows, codec, answers)
    refused = dict(refused or {})
    prompts = _encode_prompts(codec, answers, refused)
    completions = _encode_completions(codec, answers, prompts, refused)
    in_thought = {answer.row for answer, each in zip(answers, completions, strict=True) if each.in_thought}
    ids, gaps = [each.ids for each in completions], [each.gaps for each in completions]
    found = Encoded(prompts, ids, gaps, refused, edited, len(in_thought))
    _settle_refused(rows, found)
    if in_thought:
        warn(
            f"{rows.path}: {len(in_thought)} rows have an answer without a thought, and the chat template opens one "
            "before it: the answer is read as the thought's text. Give the thought with the answer, or a template that "
            "opens none (--chat-template-kwargs, --chat-template)"
        )
    if edited:
        warn(f"{rows.path}: {edited} rows have token ids that were not made for their texts, which were tokenised")
    return found


def _take_stored(rows: Rows, codec: Codec, answers: list[Answer]) -> int:
    """Give the answers their stored ids; returns the number of rows whose ids belong to other texts."""
    edited: set[int] = set()
    flipped: set[int] = set()
    for answer in answers:
        row = rows.rows[answer.row]
        if "tokenizer" not in row or not has_ids(row, codec.fingerprint):
            continue
        found = stored_completion(row, answer.name, codec.fingerprint)
        if not found and (moved := exchanged(row, answer.name, codec.fingerprint)):
            found = stored_completion(moved, answer.name, codec.fingerprint)
            answer.finished = moved[f"{answer.name}_finish"] != "length"
            flipped.add(answer.row)
        if found:
            answer.prompt_ids, answer.ids = found
        else:
            edited.add(answer.row)
            if answer.name:  # its prompt is that of the row's other completion
                answer.prompt_ids = stored_prompt(row, codec.fingerprint)
    if flipped:
        warn(
            f"{rows.path}: {len(flipped)} rows have the texts of chosen and rejected exchanged: each text keeps its "
            "token ids"
        )
    return len(edited)


def _settle_refused(rows: Rows, found: Encoded) -> None:
    """Raise the first refusal, unless invalid rows are skipped: then count and report them."""
    if not found.refused:
        return
    if not rows.skip_bad:
        row, error = min(found.refused.items())
        raise InputError(f"{rows.place(row)}: {error.message}", error.hint)
    reasons = Counter(error.message for error in found.refused.values())
    warn_of_skipped(rows.path, len(rows.rows) - len(found.refused), reasons)
    rows.skipped.update(reasons)


def _encode_prompts(codec: Codec, answers: list[Answer], refused: dict[int, Refusal]) -> list[list[int]]:
    distinct = _first_of_each((answer.prompt.key, answer) for answer in answers if answer.prompt_ids is None)
    firsts = list(distinct.values())
    bad: dict[Hashable, Refusal] = {}
    encoded = codec.encode_prompts(
        [first.prompt for first in firsts], lambda n, error: bad.update({firsts[n].prompt.key: error})
    )
    ids_of = dict(zip(distinct, encoded, strict=True))
    refused.update({a.row: bad[a.prompt.key] for a in answers if a.prompt_ids is None and a.prompt.key in bad})
    return [ids_of[a.prompt.key] if a.prompt_ids is None else a.prompt_ids for a in answers]


def _encode_completions(
    codec: Codec, answers: list[Answer], prompt_ids: list[list[int]], refused: dict[int, Refusal]
) -> list[Completion]:
    keys = [
        (answer.prompt.key, *prompt, _key(answer.completion), answer.finished)
        for answer, prompt in zip(answers, prompt_ids, strict=True)
    ]
    left = [n for n, answer in enumerate(answers) if answer.ids is None and answer.row not in refused]
    distinct = _first_of_each((keys[n], n) for n in left)
    firsts = list(distinct.values())
    bad: dict[Hashable, Refusal] = {}
    encoded = codec.encode_answers(
        [answers[n].prompt for n in firsts],
        [answers[n].completion for n in firsts],
        [prompt_ids[n] for n in firsts],
        [answers[n].finished for n in firsts],
        lambda n, error: bad.update({keys[firsts[n]]: error}),
    )
    ids_of = dict(zip(distinct, encoded, strict=True))
    refused.update({answers[n].row: bad[keys[n]] for n in left if keys[n] in bad})
    return [
        Completion(codec.with_end(answer.prompt, answer.ids, answer.finished))
        if answer.ids is not None
        else ids_of.get(key, Completion([]))
        for answer, key in zip(answers, keys, strict=True)
    ]


def _first_of_each(items: Iterable[tuple[Hashable, V]]) -> dict[Hashable, V]:
    """The first value of each key."""
    found: dict[Hashable, V] = {}
    for key, value in items:
        found.setdefault(key, value)
    return found


def _key(value: Text) -> Hashable:
    return value if isinstance(value, str) else ("messages", json.dumps(value, sort_keys=True))


def row_tokens(codec: Codec, row: Mapping[str, Any], *, finished: bool) -> tuple[list[int], list[int], Gaps]:
    """(prompt ids, completion ids, the completion's gaps) of a completion row.

    The ids are those that it stores for its texts, or the texts' tokenised.

    Raises Refusal for a chat that the template refuses.
    """
    prompt, stored = prompt_of(row), stored_completion(row, "completion", codec.fingerprint)
    if stored:
        return stored[0], codec.with_end(prompt, stored[1], finished), ()
    [prompt_ids] = codec.encode_prompts([prompt])
    [found] = codec.encode_answers([prompt], [row["completion"]], [prompt_ids], [finished])
    return prompt_ids, found.ids, found.gaps
