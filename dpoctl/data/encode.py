"""Rows to what training reads: examples for sft, unique prompts and completions with pairs by index for the rest."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..errors import InputError
from ..log import warn
from .readers import Rows
from .schema import shape_of
from .tokens import (
    bos_length,
    encode_completion,
    encode_completions,
    encode_prompt,
    encode_prompts,
    encode_text,
    encode_texts,
    eos_id,
    fingerprint,
    shared,
    spells_special,
)

__all__ = [
    "Example",
    "PairData",
    "encode_completion",
    "encode_completions",
    "encode_examples",
    "encode_pairs",
    "encode_prompt",
    "encode_prompts",
    "encode_text",
    "encode_texts",
    "fingerprint",
    "truncate",
]

_LOST = ("dropped", "too_short", "equal_dropped", "empty_dropped")


@dataclass
class Example:
    """A sequence of token ids; those from `start` (1 or more) on are trained on. `line`: the row's in its file."""

    ids: list[int]
    start: int
    line: int = field(default=0, compare=False)


@dataclass
class PairData:
    """Preference pairs over unique completions: whatever many pairs share is held, and forwarded, once.

    `prompts`: ids of each unique prompt, in order of first appearance. `completions`: ids of each unique (prompt,
    completion), EOS included where the text ended; `prompt_of` is the prompt of each. `pairs`: (chosen, rejected) as
    indices of completions; `lines` the source line of each and `margins` the row's `margin`, if it has one.
    `counts`: rows, pairs, truncated, equal_dropped, empty_dropped, special_text, from_ids, all in pairs.
    """

    prompts: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def truncate(
    prompt_ids: list[int],
    completion_ids: list[int],
    max_length: int | None,
    max_prompt_length: int | None,
    bos: int = 0,
) -> tuple[list[int], list[int], bool]:
    """(prompt, completion, whether anything was cut), together at most `max_length` tokens; None is no limit.

    The prompt keeps its end, and its first `bos` ids before that: models that saw a BOS everywhere go astray without.
    How it is cut does not depend on the completion, so that the completions of a prompt go on sharing it. The
    completion keeps its beginning, one token at least; one that is cut has lost its EOS.
    Raises InputError for a max_length below 2.
    """
    limit = len(prompt_ids) if max_prompt_length is None else max(max_prompt_length, 1)
    if max_length is not None:
        if max_length < 2:
            raise InputError(f"max_length {max_length}: expected room for a token of the prompt and one of the answer")
        limit = min(limit, max_length - 1)
    prompt = prompt_ids
    if len(prompt_ids) > limit:
        kept = min(bos, limit - 1)
        prompt = prompt_ids[:kept] + prompt_ids[len(prompt_ids) - (limit - kept) :]
    completion = completion_ids if max_length is None else completion_ids[: max_length - len(prompt)]
    return prompt, completion, len(prompt) < len(prompt_ids) or len(completion) < len(completion_ids)


def encode_examples(
    rows: Rows,
    tokenizer,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    field: str | None = None,
    overlong: str = "truncate",
) -> tuple[list[Example], dict[str, int]]:
    """Examples for sft. Of texts every token counts; of prompt and completion, or messages, the (last) answer alone.

    With `field` ("chosen") the rows are preferences and that completion is trained on (Preferred-FT). What is longer
    than `max_length`: `overlong` "truncate" cuts it, "drop" leaves it out, "split" makes windows of a text that share
    one token, so that each token is predicted once. Counts: rows, examples, truncated, dropped, split, too_short
    (nothing to predict, or to predict it from), special_text, from_ids, the last two in rows.
    Raises InputError for a row without the fields, an over-long answer under "split", and where no example is left.
    """
    counts = dict.fromkeys(("rows", "examples", "truncated", "dropped", "split", "too_short", "special_text"), 0)
    counts |= {"from_ids": 0, "rows": len(rows.rows)} | rows.skipped
    is_text = [field is None and shape_of(row) == "text" for row in rows.rows]
    examples: list[list[Example]] = [[] for _ in rows.rows]

    texts = [i for i, text in enumerate(is_text) if text]
    finished = [rows.rows[i].get("finish") != "length" for i in texts]
    for i, ids in zip(texts, encode_texts(tokenizer, [rows.rows[i]["text"] for i in texts], finished), strict=True):
        examples[i] = _windows(ids, max_length, overlong, counts)

    answers = [_answer(rows, i, field) for i, text in enumerate(is_text) if not text]
    bos = bos_length(tokenizer)
    for answer, prompt_ids, ids in zip(answers, *_encode_answers(rows, tokenizer, answers), strict=True):
        counts["from_ids"] += answer.ids is not None
        if not prompt_ids or not ids:
            counts["too_short"] += 1
            continue
        prompt, completion, cut = truncate(prompt_ids, ids, max_length, max_prompt_length, bos)
        if cut and overlong == "split":
            raise InputError(
                f"{_place(rows, answer)}: {len(prompt_ids) + len(ids)} tokens are too many, and only a text without a "
                "prompt can be split",
                hint="give --overlong truncate or drop, or a larger --max-length",
            )
        if cut and overlong == "drop":
            counts["dropped"] += 1
            continue
        counts["truncated"] += cut
        examples[answer.row] = [Example(prompt + completion, len(prompt))]

    parts = [[rows.rows[i]["text"]] for i in texts] + [[answer.prompt, answer.completion] for answer in answers]
    _count_special(rows, tokenizer, parts, counts)
    flat = [replace(example, line=line) for line, row in zip(rows.lines, examples, strict=True) for example in row]
    counts["examples"] = len(flat)
    _refuse_none(rows, counts, "examples")
    return flat, counts


def encode_pairs(rows: Rows, tokenizer, *, max_length: int | None, max_prompt_length: int | None) -> PairData:
    """Preference rows as pairs of indices into unique completions, which point to unique prompts.

    A completion is known by its prompt's ids and its own. Dropped, and counted: pairs whose completions are equal
    after truncation (no gradient), and pairs with a prompt or completion without any token.
    Raises InputError for a row without the fields and where no pair is left.
    """
    data = PairData()
    counts = dict.fromkeys(("rows", "pairs", "truncated", "equal_dropped", "empty_dropped", "special_text"), 0)
    counts |= {"from_ids": 0, "rows": len(rows.rows)} | rows.skipped
    answers = [_answer(rows, i, name) for i in range(len(rows.rows)) for name in ("chosen", "rejected")]
    prompt_ids, ids = _encode_answers(rows, tokenizer, answers)
    bos = bos_length(tokenizer)
    prompt_at: dict[tuple, int] = {}
    completion_at: dict[tuple, int] = {}

    def place(prompt: list[int], completion: list[int]) -> int:
        """The index of a completion, entered where it is new."""
        p = prompt_at.setdefault(tuple(prompt), len(data.prompts))
        if p == len(data.prompts):
            data.prompts.append(prompt)
        c = completion_at.setdefault((p, *completion), len(data.completions))
        if c == len(data.completions):
            data.completions.append(completion)
            data.prompt_of.append(p)
        return c

    for i, row in enumerate(rows.rows):
        both = slice(2 * i, 2 * i + 2)
        counts["from_ids"] += all(answer.ids is not None for answer in answers[both])
        if not all(prompt_ids[both]) or not all(ids[both]):
            counts["empty_dropped"] += 1
            continue
        chosen, rejected = (
            truncate(prompt, completion, max_length, max_prompt_length, bos)
            for prompt, completion in zip(prompt_ids[both], ids[both], strict=True)
        )
        if chosen[:2] == rejected[:2]:
            counts["equal_dropped"] += 1
            continue
        counts["truncated"] += chosen[2] or rejected[2]
        data.pairs.append((place(*chosen[:2]), place(*rejected[:2])))
        data.lines.append(rows.lines[i])
        data.margins.append(None if row.get("margin") is None else float(row["margin"]))
    _count_special(rows, tokenizer, [[row["prompt"], row["chosen"], row["rejected"]] for row in rows.rows], counts)
    counts["pairs"] = len(data.pairs)
    data.counts = counts
    _refuse_none(rows, counts, "pairs")
    return data


# --- answers: prompt and completion of a row, as text or as stored ids ---


@dataclass
class _Answer:
    row: int
    prompt: str | list[dict]
    completion: str | list[dict]
    finished: bool
    prompt_ids: list[int] | None = None  # stored ids, None where they are of another tokenizer
    ids: list[int] | None = None


def _answer(rows: Rows, i: int, name: str | None) -> _Answer:
    """Row i's prompt and answer: its field `name`, else its completion or last message."""
    row = rows.rows[i]
    if name is None and shape_of(row) == "messages":
        return _Answer(i, row["messages"][:-1], row["messages"][-1:], row.get("finish") != "length")
    name = name or "completion"
    for needed in ("prompt", name):
        if row.get(needed) is None:
            hint = "--field chosen trains on the preferred completions" if row.get("chosen") is not None else ""
            raise InputError(f"{rows.path}:{rows.lines[i]}: field '{needed}': expected text, got nothing", hint)
    prefix = "" if name == "completion" else f"{name}_"
    return _Answer(
        i,
        row["prompt"],
        row[name],
        row.get(f"{prefix}finish") != "length",
        row.get("prompt_ids"),
        row.get(f"{name}_ids"),
    )


def _encode_answers(rows: Rows, tokenizer, answers: list[_Answer]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt ids and completion ids of each answer. Stored ids are used where the row's tokenizer is this one."""
    eos = eos_id(tokenizer)
    ours = fingerprint(tokenizer) if any("tokenizer" in rows.rows[answer.row] for answer in answers) else None
    for answer in answers:
        if ours is None or rows.rows[answer.row].get("tokenizer") != ours:
            answer.prompt_ids = answer.ids = None
        else:
            answer.prompt_ids, answer.ids = (ids and shared(ids) for ids in (answer.prompt_ids, answer.ids))

    fresh = _unique((_key(answer.prompt), answer) for answer in answers if answer.prompt_ids is None)
    firsts = list(fresh.values())
    encoded = encode_prompts(tokenizer, [first.prompt for first in firsts], lambda n: _place(rows, firsts[n]))
    prompt_of = dict(zip(fresh, encoded, strict=True))
    prompt_ids = [prompt_of[_key(a.prompt)] if a.prompt_ids is None else a.prompt_ids for a in answers]

    keys = [
        None if answer.ids is not None else (_key(answer.prompt), *prompt, _key(answer.completion), answer.finished)
        for answer, prompt in zip(answers, prompt_ids, strict=True)
    ]
    fresh = _unique((key, n) for n, key in enumerate(keys) if key is not None)
    places = list(fresh.values())
    encoded = encode_completions(
        tokenizer,
        [answers[n].prompt for n in places],
        [answers[n].completion for n in places],
        [prompt_ids[n] for n in places],
        [answers[n].finished for n in places],
        lambda n: _place(rows, answers[places[n]]),
    )
    ids_of = dict(zip(fresh, encoded, strict=True))
    ids = [
        ids_of[key] if answer.ids is None else _with_eos(answer, eos) for answer, key in zip(answers, keys, strict=True)
    ]
    return prompt_ids, ids


def _with_eos(answer: _Answer, eos: int) -> list[int]:
    return answer.ids + [eos] if answer.finished and answer.ids[-1:] != [eos] else answer.ids


def _unique(items: Iterable[tuple]) -> dict:
    """The first value of each key."""
    found = {}
    for key, value in items:
        found.setdefault(key, value)
    return found


def _key(value: str | list[dict]) -> str | tuple:
    return value if isinstance(value, str) else ("messages", json.dumps(value, sort_keys=True))


def _place(rows: Rows, answer: _Answer) -> str:
    return f"{rows.path}:{rows.lines[answer.row]}"


def _windows(ids: list[int], max_length: int | None, overlong: str, counts: dict[str, int]) -> list[Example]:
    """A text's ids as examples in which every token but the first is predicted."""
    if len(ids) < 2:
        counts["too_short"] += 1
        return []
    if max_length is None or len(ids) <= max_length:
        return [Example(ids, 1)]
    if max_length < 2:
        raise InputError(f"max_length {max_length}: expected 2 or more, a token to predict and one to predict it from")
    if overlong == "drop":
        counts["dropped"] += 1
        return []
    if overlong == "split":
        counts["split"] += 1
        # A window begins with the token that the one before ended in: predicted there, context here.
        return [Example(ids[at : at + max_length], 1) for at in range(0, len(ids) - 1, max_length - 1)]
    counts["truncated"] += 1
    return [Example(ids[:max_length], 1)]


def _count_special(rows: Rows, tokenizer, parts: list[list], counts: dict[str, int]) -> None:
    spells = spells_special(tokenizer)
    counts["special_text"] = sum(any(spells(part) for part in row) for row in parts)
    if counts["special_text"]:
        warn(
            f"{rows.path}: {counts['special_text']} rows spell a special token of the tokenizer, which is read as "
            "plain text (chats: give lists of messages, the chat template then writes the special tokens)"
        )


def _refuse_none(rows: Rows, counts: dict[str, int], what: str) -> None:
    if not counts[what]:
        reasons = ", ".join(f"{counts[key]} {key}" for key in _LOST if counts.get(key))
        raise InputError(
            f"{rows.path}: no {what} are left to train on ({reasons})", "look at the rows, or --max-length"
        )
