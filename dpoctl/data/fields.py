"""Checks of single fields of a row. Each raises BadRow, which names the field, what was expected and what was found."""

import difflib
import json
import math
from typing import Any

from .jsonl import named

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_GROUPS = (("prompt", "chosen", "rejected"), ("completion",), ("text",))  # fields that are missing together
_FIELDS = ("prompt", "chosen", "rejected", "completion", "text", "messages", "reference")
_SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "context", "post", "article", "user", "problem", "task"),
    "completion": ("response", "answer", "output", "summary", "generation", "assistant", "solution", "target"),
    "chosen": (
        *("preferred", "accepted", "winner", "better", "answer_chosen", "response_chosen", "chosen_response"),
        *("chosen_answer", "positive", "good", "win", "response_j", "preferred_response", "chosen_text"),
    ),
    "rejected": (
        *("dispreferred", "loser", "worse", "answer_rejected", "response_rejected", "rejected_response"),
        *("rejected_answer", "negative", "bad", "lose", "response_k", "dispreferred_response", "rejected_text"),
    ),
    "text": ("review", "content", "document", "body"),
    "role": ("from", "speaker"),
    "content": ("value", "text"),
    "user": ("human",),
    "assistant": ("gpt", "bot", "ai", "model"),
}


class BadRow(Exception):
    """A row that its schema refuses; `problem` is the message without the offending value."""

    def __init__(self, field: str, expected: str, got: str, hint: str = ""):
        self.problem = f"field '{field}': expected {expected}"
        self.hint = hint
        super().__init__(f"{self.problem}, got {got}")


def missing(row: dict, field: str, expected: str) -> BadRow:
    """The error for an absent field; its hint is the --columns that would give it, where columns have similar names."""
    keys = [key for key in row if row[key] is not None]
    group = next((group for group in _GROUPS if field in group), (field,))
    found = {name: _similar(name, keys) for name in group if row.get(name) is None}
    if found.get(field):
        hint = _columns_option({name: column for name, column in found.items() if column})
    elif keys:
        shown = ", ".join(map(repr, keys[:8]))
        hint = f"the row has {shown}" + (f"; --columns {field}=COLUMN names the right one" if group != (field,) else "")
    else:
        hint = "the row is empty"
    return BadRow(field, expected, "nothing", hint)


def _columns_option(columns: dict[str, str]) -> str:
    """--columns with these columns, whatever their names."""
    if any(mark in column or column != column.strip() for column in columns.values() for mark in ",+="):
        return f"--columns '{json.dumps(columns, ensure_ascii=False)}'"
    return "--columns " + ",".join(f"{name}={column}" for name, column in columns.items())


def _similar(field: str, keys: list[str]) -> str | None:
    """The column that most likely holds a field."""
    lower = {key.lower().strip(): key for key in keys}
    near = next((lower[name] for name in (field, *_SYNONYMS.get(field, ())) if name in lower), None)
    others = [key for key in keys if not key.startswith(f"{field}_") and key not in _FIELDS]  # prompt_id is no prompt
    return near or next(iter(difflib.get_close_matches(field, others, n=1, cutoff=0.7)), None)


def check_string(value: Any, field: str, *, empty: bool = False) -> str:
    """A string of valid Unicode (JSON can spell lone surrogates), not blank unless `empty`."""
    if not isinstance(value, str):
        hint = "write numbers as text, in quotes" if is_number(value) else ""
        raise BadRow(field, "a string or a list of messages", named(value), hint)
    if not empty and not value.strip():
        raise BadRow(field, "text", "only blanks" if value else "an empty string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(field, "valid Unicode", f"the lone surrogate {value[error.start]!a}") from None
    return value


def check_messages(value: list, field: str) -> list[dict]:
    """A list of `{"role", "content"}`, of which at least one has text or a tool call.

    The content may be null, or absent, where the message has `tool_calls`.
    """
    for n, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow(f"{field}[{n}]", "an object with 'role' and 'content'", named(message))
        for name in ("role", "content"):
            if message.get(name) is None:
                if name == "content" and message.get("tool_calls"):
                    continue
                like = _similar(name, [key for key in message if message[key] is not None])
                hint = f"rename '{like}' to '{name}'" if like else "a message has 'role' and 'content'"
                raise BadRow(f"{field}[{n}].{name}", "a string", "nothing", hint)
            check_string(message[name], f"{field}[{n}].{name}", empty=True)
        role = message["role"]
        if role not in ROLES:
            synonyms = [right for right in ROLES if role.lower() in (right, *_SYNONYMS.get(right, ()))]
            near = synonyms or difflib.get_close_matches(role, ROLES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else ""
            raise BadRow(f"{field}[{n}].role", f"one of {', '.join(ROLES)}", repr(role), hint)
    if not any(map(says_something, value)):
        raise BadRow(field, "messages with text", "none" if value else "an empty list")
    return value


def says_something(message: dict) -> bool:
    """Whether a message has text or a tool call."""
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def check_text(row: dict, field: str) -> str | list[dict]:
    """A required string or list of messages."""
    value = row.get(field)
    if value is None:
        raise missing(row, field, "a string or a list of messages")
    return check_messages(value, field) if isinstance(value, list) else check_string(value, field)


def check_number(row: dict, field: str) -> None:
    """An optional finite number."""
    value = row.get(field)
    if value is None:
        return
    if not is_number(value):
        raise BadRow(field, "a finite number", named(value))


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def check_ids(row: dict, field: str) -> None:
    """An optional list of token ids."""
    ids = row.get(field)
    if ids is None:
        return
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise BadRow(field, "a list of token ids (integers from 0)", named(ids))


def check_finish(row: dict, field: str) -> None:
    """An optional "stop" (ended with an end token) or "length" (cut)."""
    if row.get(field) not in (None, "stop", "length"):
        raise BadRow(field, "'stop' or 'length'", named(row[field]))


def check_k(row: dict, field: str) -> None:
    """An optional sample number."""
    k = row.get(field)
    if k is not None and (type(k) is not int or k < 0):
        raise BadRow(field, "a sample number (an integer from 0)", named(k))


def check_prompt_id(row: dict, default: str | None = None) -> None:
    """A string or integer, stored as a string; `default` where the row has none."""
    value = row.get("prompt_id", default)
    value = default if value is None else value
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise BadRow("prompt_id", "a string or an integer", named(value))
    row["prompt_id"] = check_string(str(value), "prompt_id")


def check_answer(row: dict, field: str, ids: str, finish: str) -> None:
    """A completion: text or the assistant's messages, with its `ids` and `finish` fields.

    It may be empty only where the row says how it ended: a sample that ends at once is its EOS alone.
    """
    check_ids(row, ids)
    check_finish(row, finish)
    value = row.get(field)
    if value is None:
        raise missing(row, field, "a string or a list of messages")
    if isinstance(value, list):
        check_messages(value, field)
        if value[-1]["role"] != "assistant":
            raise BadRow(field, "a last message of the assistant", f"one of role '{value[-1]['role']}'")
        if not says_something(value[-1]):
            raise BadRow(field, "text in the last message", "an empty string")
        if not isinstance(row["prompt"], list):
            raise BadRow("prompt", f"a list of messages, as '{field}' is", named(row["prompt"]))
    else:
        check_string(value, field, empty=row.get(finish) is not None)
