"""Verdicts as JSON: the schema that a request holds, what it asks in words, and how the answer is read."""

import json
import re
from typing import Any

from .verdicts import CUT_THOUGHT, UNCLEAR, Verdict, after_thought, choice_in

FIELD = "preferred"
NO_JSON = "not the JSON that was asked for"
NO_FIELD = f"no field '{FIELD}'"

_COMPARISON = "comparison"
_FENCED = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL | re.IGNORECASE)


def response_format(template: str, explained: bool) -> dict[str, Any]:
    """The schema of an answer, as chat-completions servers take it: the choice, after a comparison if `explained`.

    The choice is A or B, or tie where the request's template offers it.
    """
    choices = ["A", "B"] + (["tie"] if re.search(rf"{FIELD}:\s*tie\b", template, re.IGNORECASE) else [])
    fields: dict[str, Any] = {_COMPARISON: {"type": "string"}} if explained else {}
    fields[FIELD] = {"type": "string", "enum": choices}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def in_words(form: dict[str, Any]) -> str:
    """What a request says of the form, after the text that asks for a line: not every server shows the schema."""
    fields = form["json_schema"]["schema"]["properties"]
    choices = ", ".join(json.dumps(choice) for choice in fields[FIELD]["enum"])
    named = f'"{_COMPARISON}" (one sentence), then ' if _COMPARISON in fields else ""
    return (
        f'\n\nWrite all this as one JSON object in place of lines, with nothing before or after it: {named}"{FIELD}" '
        f"({choices})."
    )


def read_json(answer: str) -> Verdict | None:
    """The verdict of an answer in JSON; None for an answer that is no JSON object, such as lines of text.

    Text that begins as an object but cannot be read has no verdict: a string within it might look like a line with one.
    """
    text = after_thought(answer)
    if text is None:
        return Verdict(None, CUT_THOUGHT)
    text = text.strip()
    fenced = _FENCED.match(text)
    text = fenced[1].strip() if fenced else text
    if not text.startswith("{"):
        return None
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return Verdict(None, NO_JSON)
    named = [value for name, value in pairs if name.strip().lower() == FIELD]
    if not named:
        return Verdict(None, NO_FIELD)
    choice = choice_in(named[0]) if len(named) == 1 and isinstance(named[0], str) else None
    return Verdict(choice, "" if choice else UNCLEAR)
