"""JSON files: JSONL line by line, and a list of objects, each plain or compressed."""

import json
from collections.abc import Iterator
from os import PathLike
from typing import Any

from ..errors import InputError
from .streams import opened

_DECODER = json.JSONDecoder()
_BOM = b"\xef\xbb\xbf"
SKIP_HINT = "fix the line, or skip and count such rows with --skip-bad-rows"
Found = tuple[int, dict | InputError]  # (1-based line or row, the row, or why it cannot be read)


def read_jsonl(path: str | PathLike) -> Iterator[tuple[int, dict]]:
    """(1-based line, object) of each line of a JSONL file.

    Blank lines, a byte order mark and CRLF are tolerated. Raises InputError for a missing or unreadable file, truncated
    gzip, bytes that are not UTF-8, broken JSON, and JSON that is not an object.
    """
    for line, found in jsonl_rows(path):
        if isinstance(found, InputError):
            raise found
        yield line, found


def jsonl_rows(path: str | PathLike) -> Iterator[Found]:
    """(line, object) of each line, or (line, error) where the line cannot be read. Raises as `read_jsonl` otherwise."""
    with opened(path) as stream:
        for line, raw in enumerate(stream, 1):
            if line == 1:
                raw = raw.removeprefix(_BOM)
            if not raw.strip():
                continue
            try:
                row = _object(raw)
            except ValueError as error:
                message, _, hint = str(error).partition("\n")
                yield line, InputError(f"{path}:{line}: {message}", hint or SKIP_HINT)
            else:
                yield line, row


def list_rows(path: str | PathLike) -> Iterator[Found]:
    """(line on which it begins, object) of each element of a file that holds one JSON list, held in memory as text."""
    with opened(path) as stream:
        raw = stream.read().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8", "save the file as UTF-8") from None
    place = _Place(text)
    at = _blanks(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line = place.line(at)
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            hint = "the file is truncated or damaged: nothing after this place can be read"
            raise InputError(f"{path}:{place.line(error.pos)}: broken JSON: {error.msg}", hint) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{line}: broken JSON: {error}", "fix the file") from None
        if isinstance(value, dict):
            yield line, value
        else:
            yield line, InputError(f"{path}:{line}: expected a JSON object, got {named(value)}", SKIP_HINT)
        at = _blanks(text, end)
        if text[at : at + 1] == ",":
            at = _blanks(text, at + 1)
        elif text[at : at + 1] != "]":
            hint = "the file is truncated or damaged"
            raise InputError(f"{path}:{place.line(at)}: broken JSON: expected ',' or ']' after an object", hint)
    if text[at + 1 :].strip():
        raise InputError(f"{path}:{place.line(at)}: text after the end of the list", "give each list a file of its own")


class _Place:
    """Line numbers of increasing positions in a text."""

    def __init__(self, text: str):
        self.text, self.at, self.number = text, 0, 1

    def line(self, at: int) -> int:
        self.number += self.text.count("\n", self.at, at)
        self.at = max(at, self.at)
        return self.number


def _blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t") and at < len(text):
        at += 1
    return at


def _object(raw: bytes) -> dict:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line\nsave the file as UTF-8") from None
    try:
        row = _loaded(text.rstrip())  # a line break left at the end would shift the reported column
    except json.JSONDecodeError as error:
        hint = "expected JSON objects, one a line" if text.strip() in ("{", "[", "[{") else ""
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}\n{hint}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested lists
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {named(row)}")
    return row


def _loaded(text: str) -> Any:
    """`json.loads(text)`, twice as fast where no white space surrounds the value, as in nearly every line."""
    try:
        value, end = _DECODER.raw_decode(text)
    except ValueError:
        return json.loads(text)
    return value if end == len(text) else json.loads(text)


def named(value: Any) -> str:
    """A value for an error message: shortened, and an array or object by its type and size."""
    if value is None:
        return "nothing"
    if isinstance(value, (list, dict)) and value:
        return f"a JSON {'array' if isinstance(value, list) else 'object'} of {len(value)}"
    try:
        shown = json.dumps(value)
    except (TypeError, ValueError):  # a value that JSON has no form for, such as a date in a table
        return type(value).__name__
    return shown if len(shown) <= 48 else f"{shown[:45]}..."
