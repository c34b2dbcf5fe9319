"""Rows in JSONL files: read as a stream, checked against what each kind of file holds, one shape for what follows.

A field that is null counts as absent (`datasets` writes null where a row lacks a column); unknown fields are kept.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import InputError
from ..log import warn
from .jsonl import SKIP_HINT, named, objects, read_jsonl

__all__ = ["ROLES", "Rows", "load_rows", "read_jsonl", "shape_of", "stream_rows", "warn_of_skipped"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TURN = "\n\nAssistant:"  # opens the answer in dialogues of the Anthropic HH format
_SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "context", "post", "article"),
    "completion": ("response", "answer", "output", "summary", "generation"),
    "chosen": ("preferred", "accepted", "winner", "better", "answer_chosen", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "answer_rejected", "response_rejected"),
    "text": ("review", "content", "document", "body"),
    "role": ("from",),
    "content": ("value", "text"),
    "user": ("human",),
    "assistant": ("gpt", "bot", "ai", "model"),
}


@dataclass(frozen=True)
class Rows:
    """The checked rows of a file, the 1-based line of each, and how many rows were skipped for which reason."""

    path: str
    rows: list[dict]
    lines: list[int]
    skipped: dict[str, int]


class _BadRow(Exception):
    def __init__(self, field: str, expected: str, got: str, hint: str = ""):
        self.problem = f"field '{field}': expected {expected}"
        self.hint = hint
        super().__init__(f"{self.problem}, got {got}")


def load_rows(path, kind: str, *, skip_bad: bool = False, limit: int | None = None) -> Rows:
    """The rows (the first `limit` good ones) of a JSONL file, checked and in one shape.

    `kind` is text, prompts, completions, preferences or evaluations. `prompt_id` becomes a string (the 0-based row
    number where prompts and completions have none), `k` of completions counts up within its prompt_id where absent,
    whole dialogues in preferences become `prompt`/`chosen`/`rejected`, a list of messages in `text` `messages`.
    Raises InputError for an unreadable or empty file and for a bad row, naming file, line and field; with `skip_bad`
    bad rows and broken lines are left out, counted by reason and warned of once.
    """
    skipped: Counter = Counter()
    pairs = list(stream_rows(path, kind, skip_bad=skip_bad, limit=limit, skipped=skipped))
    warn_of_skipped(path, len(pairs), skipped)
    return Rows(str(path), [row for _, row in pairs], [line for line, _ in pairs], dict(skipped))


def stream_rows(
    path, kind: str, *, skip_bad: bool = False, limit: int | None = None, skipped: Counter | None = None
) -> Iterator[tuple[int, dict]]:
    """(1-based line, row) one after the other, as `load_rows` has them; text rows are held one at a time.

    `skipped` is counted up as bad rows are passed over.
    """
    check = _CHECKS[kind]()
    skipped = Counter() if skipped is None else skipped
    good, number = 0, -1

    def refuse(problem: str, error: InputError) -> None:
        if not skip_bad:
            raise error from None
        skipped[problem] += 1

    def unreadable(error: InputError) -> None:
        refuse("unreadable line", error)

    for number, (line, row) in enumerate(objects(path, unreadable)):  # noqa: B007
        if row is None:
            continue
        try:
            row = check(number, row)
        except _BadRow as bad:
            hint = bad.hint or SKIP_HINT
            refuse(re.sub(r"\[\d+\]", "[]", bad.problem), InputError(f"{path}:{line}: {bad}", hint))
            continue
        good += 1
        yield line, row
        if good == limit:
            break
    if not good:
        what = "none of its rows can be used" if number >= 0 else "the file holds no rows"
        raise InputError(f"{path}: {what}{_listing(skipped)}", f"expected {kind} rows: JSON objects, one a line")


def warn_of_skipped(path, kept: int, skipped: dict[str, int]) -> None:
    if skipped:
        bad = sum(skipped.values())
        warn(f"{path}: {bad} of {kept + bad} rows skipped{_listing(skipped)}")


def shape_of(row: dict) -> str | None:
    """What a text row is trained on: `text`, `completion` (with its prompt) or `messages`; None where it has none."""
    if row.get("text") is not None:
        return "text"
    if row.get("completion") is not None:
        return "completion"
    return "messages" if row.get("messages") is not None else None


def _listing(skipped: dict[str, int]) -> str:
    return "".join(f"; {count} x {reason}" for reason, count in skipped.items())


# --- fields ---


def _missing(row: dict, field: str, expected: str) -> _BadRow:
    keys = [key for key in row if row[key] is not None]
    lower = {key.lower().strip(): key for key in keys}
    near = next((lower[name] for name in (field, *_SYNONYMS.get(field, ())) if name in lower), None)
    others = [key for key in keys if not key.startswith(f"{field}_")]  # prompt_id is no misspelt prompt
    near = near or next(iter(difflib.get_close_matches(field, others, n=1, cutoff=0.7)), None)
    if near is not None and near != field:
        hint = f"rename '{near}' to '{field}'"
    else:
        hint = f"the row has {', '.join(map(repr, keys[:8]))}" if keys else "the row is empty"
    return _BadRow(field, expected, "nothing", hint)


def _string(value, field: str, *, empty: bool = False) -> str:
    """A string that is text: not only blanks (unless `empty`), and valid Unicode (JSON can spell lone surrogates)."""
    if not isinstance(value, str):
        raise _BadRow(field, "a string or a list of messages", named(value))
    if not empty and not value.strip():
        raise _BadRow(field, "text", "only blanks" if value else "an empty string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _BadRow(field, "valid Unicode", f"the lone surrogate {value[error.start]!a}") from None
    return value


def _messages(value: list, field: str) -> list[dict]:
    """A list of `{"role", "content"}`, at least one with text."""
    for n, message in enumerate(value):
        if not isinstance(message, dict):
            raise _BadRow(f"{field}[{n}]", "an object with 'role' and 'content'", named(message))
        for name in ("role", "content"):
            if message.get(name) is None:
                bad = _missing(message, name, "a string")
                raise _BadRow(f"{field}[{n}].{name}", "a string", "nothing", bad.hint)
            _string(message[name], f"{field}[{n}].{name}", empty=True)
        role = message["role"]
        if role not in ROLES:
            synonyms = [right for right in ROLES if role.lower() in (right, *_SYNONYMS.get(right, ()))]
            near = synonyms or difflib.get_close_matches(role, ROLES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else ""
            raise _BadRow(f"{field}[{n}].role", f"one of {', '.join(ROLES)}", repr(role), hint)
    if not any(message["content"].strip() for message in value):
        raise _BadRow(field, "messages with text", "none" if value else "an empty list")
    return value


def _text(row: dict, field: str):
    value = row.get(field)
    if value is None:
        raise _missing(row, field, "a string or a list of messages")
    return _messages(value, field) if isinstance(value, list) else _string(value, field)


def _number(row: dict, field: str) -> None:
    value = row.get(field)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _BadRow(field, "a finite number", named(value))


def _ids(row: dict, field: str) -> None:
    ids = row.get(field)
    if ids is None:
        return
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise _BadRow(field, "a list of token ids (integers from 0)", named(ids))


def _finish(row: dict, field: str) -> None:
    if row.get(field) not in (None, "stop", "length"):
        raise _BadRow(field, "'stop' or 'length'", named(row[field]))


def _k(row: dict, field: str) -> None:
    k = row.get(field)
    if k is not None and (type(k) is not int or k < 0):
        raise _BadRow(field, "a sample number (an integer from 0)", named(k))


def _prompt_id(row: dict, default: str | None = None) -> None:
    value = row.get("prompt_id", default)
    value = default if value is None else value
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise _BadRow("prompt_id", "a string or an integer", named(value))
    row["prompt_id"] = _string(str(value), "prompt_id")


def _answer(row: dict, field: str, ids: str, finish: str) -> None:
    """A completion: text or the assistant's messages.

    It may be empty only in a row that says how it ended: a sample may end at once, and is then its EOS alone.
    """
    _ids(row, ids)
    _finish(row, finish)
    value = row.get(field)
    if value is None:
        raise _missing(row, field, "a string or a list of messages")
    if isinstance(value, list):
        _messages(value, field)
        if value[-1]["role"] != "assistant":
            raise _BadRow(field, "a last message of the assistant", f"one of role '{value[-1]['role']}'")
        if not value[-1]["content"].strip():
            raise _BadRow(field, "text in the last message", "an empty string")
        if not isinstance(row["prompt"], list):
            raise _BadRow("prompt", f"a list of messages, as '{field}' is", named(row["prompt"]))
    else:
        _string(value, field, empty=row.get(finish) is not None)


# --- the kinds: each makes a function (0-based row number, row) -> the row in its one shape ---


def _text_rows():
    def check(number: int, row: dict) -> dict:
        _finish(row, "finish")
        if isinstance(row.get("text"), list):
            row = {"messages": row["text"], **{key: row[key] for key in row if key not in ("text", "messages")}}
        shape = shape_of(row)
        if shape == "text":
            _string(row["text"], "text")
        elif shape == "messages":
            if not isinstance(row["messages"], list):
                raise _BadRow("messages", "a list of messages", named(row["messages"]))
            _split(_messages(row["messages"], "messages"), "messages")
        elif row.get("chosen") is not None:
            hint = "these look like preferences: --field chosen trains on the preferred completions"
            raise _BadRow("text", "a string ('text', 'prompt' and 'completion', or 'messages')", "nothing", hint)
        elif shape is None and row.get("prompt") is None:
            raise _missing(row, "text", "a string ('text', 'prompt' and 'completion', or 'messages')")
        else:
            _text(row, "prompt")
            _answer(row, "completion", "completion_ids", "finish")
            _ids(row, "prompt_ids")
        return row

    return check


def _prompt_rows():
    line_of: dict[str, int] = {}

    def check(number: int, row: dict) -> dict:
        _text(row, "prompt")
        _prompt_id(row, str(number))
        _ids(row, "prompt_ids")
        if row.get("reference") is not None:
            _text(row, "reference")
        # A row's random numbers hang on its prompt_id: two rows with one would be given the same samples.
        if line_of.setdefault(row["prompt_id"], number) != number:
            raise _BadRow("prompt_id", "one row for each", f"{row['prompt_id']!r} a second time")
        return row

    return check


def _completion_rows():
    prompt_of: dict[str, str | list] = {}
    seen: dict[tuple, set[int]] = {}

    def check(number: int, row: dict) -> dict:
        _text(row, "prompt")
        _prompt_id(row, str(number))
        _answer(row, "completion", "completion_ids", "finish")
        _ids(row, "prompt_ids")
        _k(row, "k")
        _number(row, "score")
        _number(row, "temperature")
        _number(row, "step")
        key = row["prompt_id"]
        # several temperatures, and several training steps, have k = 0 each
        ks = seen.setdefault((key, row.get("temperature"), row.get("step")), set())
        if row.get("k") is None:
            row["k"] = len(ks)
        if row["k"] in ks:
            raise _BadRow("k", "one row for each prompt_id and k", f"k {row['k']} of {key!r} a second time")
        if prompt_of.setdefault(key, row["prompt"]) != row["prompt"]:
            raise _BadRow("prompt", "one prompt for each prompt_id", f"another one for {key!r}")
        ks.add(row["k"])
        return row

    return check


def _preference_rows():
    def check(number: int, row: dict) -> dict:
        _prompt_id(row)
        for name in ("chosen", "rejected"):
            if row.get(name) is None:
                raise _missing(row, name, "a string or a list of messages")
        row = _dialogue(row)
        _text(row, "prompt")
        _ids(row, "prompt_ids")
        for name in ("chosen", "rejected"):
            _answer(row, name, f"{name}_ids", f"{name}_finish")
            _number(row, f"{name}_score")
            _k(row, f"{name}_k")
        _number(row, "margin")
        return row

    return check


def _evaluation_rows():
    def check(number: int, row: dict) -> dict:
        if row.get("model") is None:
            raise _missing(row, "model", "a string")
        for name in ("model", "method", "scorer", "lm"):
            if row.get(name) is not None and not isinstance(row[name], str):
                raise _BadRow(name, "a string", named(row[name]))
        if not isinstance(row.get("options") or {}, dict):
            raise _BadRow("options", "an object", named(row["options"]))
        for name in _FIGURES:
            _number(row, name)
        return row

    return check


_CHECKS = {
    "text": _text_rows,
    "prompts": _prompt_rows,
    "completions": _completion_rows,
    "preferences": _preference_rows,
    "evaluations": _evaluation_rows,
}
_FIGURES = (
    "step",
    "temperature",
    "reward",
    "reward_se",
    "kl",
    "kl_se",
    "kl_exact",
    "kl_exact_se",
    "n",
    "length",
    "length_se",
    "ended",
    "perplexity_ref",
    "perplexity_lm",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "repetition",
)


# --- whole dialogues ---


def _split(value: str | list, field: str) -> tuple[str | list, str | list]:
    """A whole dialogue before and from its last answer: the assistant's last message, or what follows its last turn."""
    if isinstance(value, list):
        if not value or value[-1]["role"] != "assistant":
            got = f"one of role '{value[-1]['role']}'" if value else "none"
            raise _BadRow(field, "a last message of the assistant", got)
        if not any(message["content"].strip() for message in value[:-1]):
            raise _BadRow(field, "a message with text before the answer", "none")
        if not value[-1]["content"].strip():
            raise _BadRow(field, "text in the last message", "an empty string")
        return value[:-1], value[-1:]
    prompt, turn, answer = _string(value, field).rpartition(_TURN)
    if not turn:
        hint = "give the prompt as a field of its own: 'prompt', 'chosen', 'rejected'"
        raise _BadRow(field, f"a dialogue with an {_TURN!r} turn, as there is no 'prompt'", named(value), hint)
    return prompt + turn, answer


def _dialogue(row: dict) -> dict:
    """The row with prompt, chosen and rejected, where chosen and rejected hold the whole dialogue.

    They do where there is no prompt, and where they are messages that do not begin with the assistant's: the prompt
    then only repeats what stands in them.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    for name in ("chosen", "rejected"):
        if isinstance(row[name], list):
            _messages(row[name], name)
        if type(row[name]) is not type(chosen):
            raise _BadRow(name, "the same form as 'chosen' (a string or a list of messages)", named(row[name]))
    if prompt is not None and not (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):
        return row
    before, chosen = _split(chosen, "chosen")
    other, rejected = _split(rejected, "rejected")
    if before != other:
        raise _BadRow("rejected", "the same dialogue as 'chosen' up to the last answer", "another")
    if prompt is not None and prompt != before and prompt not in [message["content"] for message in before]:
        raise _BadRow("prompt", "the messages that 'chosen' begins with", named(prompt))
    return {**row, "prompt": before, "chosen": chosen, "rejected": rejected}
