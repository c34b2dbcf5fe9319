"""Messages as people write them, in one form: a list of `{"role", "content"}`."""

from typing import Any

from . import strict_json
from .fields import ROLES, BadRow
from .jsonl import named

_ROLES = {  # of ShareGPT's `from`
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    **{role: role for role in ROLES},
}
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose value is the JSON of a tool call
_CALL = '{"name": ..., "arguments": {...}}, or a list of such calls'


def as_messages(value: Any, field: str) -> Any:
    """A list of messages in its normal form; strings, and whatever else a check will refuse, as they are.

    One message becomes a list of one, `from` and `value` become `role` and `content`, a list of text parts their text,
    absent keys that are null are left out, and a list written as JSON text is read. Raises BadRow for parts that are
    not text and for a list written as Python text.
    """
    if isinstance(value, str):
        value = _from_text(value, field)
    if isinstance(value, dict) and not {"role", "from"}.isdisjoint(value):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message(each, f"{field}[{n}]") if isinstance(each, dict) else each for n, each in enumerate(value)]


def _from_text(value: str, field: str) -> Any:
    """A list of messages that was saved as text, as CSV files do; any other text as it is."""
    start = value.lstrip()[:64].replace(" ", "")
    if not start.startswith(("[{", "{")):
        return value
    if start.startswith(("[{'role'", "[{'content'", "[{'from'", "{'role'", "{'content'")):
        hint = "save the file as .jsonl or .parquet, or the column with json.dumps"
        raise BadRow(field, "text or a list of messages", "a list written as Python text", hint)
    if not start.startswith(('[{"role"', '[{"content"', '[{"from"', '[{"value"', '{"role"', '{"content"', '{"from"')):
        return value
    try:
        return strict_json.loads(value)
    except strict_json.Ambiguous as error:
        raise BadRow(field, "JSON that is read in one way", str(error)) from None
    except (ValueError, RecursionError):
        return value


def _message(message: dict, field: str) -> dict:
    made = {key: value for key, value in message.items() if value is not None}
    if "role" not in made and isinstance(made.get("from"), str):
        made = _of_sharegpt(made, field)
    if isinstance(made.get("content"), list):
        made["content"] = _joined(made["content"], f"{field}.content")
    if "content" not in made and made.get("tool_calls"):
        made["content"] = None
    return made if made != message or list(made) != list(message) else message


def _of_sharegpt(message: dict, field: str) -> dict:
    """A message of `from` and `value` in the usual names; a function call becomes the assistant's tool call."""
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    role, content = message["from"], message.get("value", message.get("content"))
    if role.lower() in _CALLS and "tool_calls" not in rest:
        return {"role": "assistant", "content": None, "tool_calls": _calls(content, f"{field}.value"), **rest}
    made = {"role": _ROLES.get(role.lower(), role)}
    return made | ({} if content is None else {"content": content}) | rest


def _calls(value: Any, field: str) -> list[dict]:
    """The tool calls that the JSON of a function call holds. Raises BadRow for another value."""
    found = value
    if isinstance(value, str):
        try:
            found = strict_json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(field, _CALL, named(value)) from None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(field, _CALL, named(value))
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]


def _joined(parts: list, field: str) -> str | list:
    """The text of a list of text parts."""
    texts = []
    for n, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else named(part)
            hint = "dpoctl trains models of text: leave rows with images out, or skip them with --skip-bad-rows"
            raise BadRow(f"{field}[{n}]", 'text, or a part {"type": "text", "text": ...}', kind, hint)
        texts.append(text)
    return "".join(texts)


def read_json_field(row: dict, field: str, kind: type, expected: str) -> None:
    """Read a list or an object that may be saved as JSON text; an empty one is absent. Raises BadRow for another."""
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        try:
            row[field] = value = strict_json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(field, expected, named(value)) from None
    elif isinstance(value, str):
        row[field] = value = None
    if value is not None and not isinstance(value, kind):
        raise BadRow(field, expected, named(value))
    if value is None or not value:
        del row[field]
