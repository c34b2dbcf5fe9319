"""JSON Lines, plain or compressed, line by line."""

import json
from collections.abc import Iterator
from os import PathLike
from typing import Any

from ..errors import InputError
from . import strict_json
from .streams import opened

_BOM = b"\xef\xbb\xbf"
SKIP_HINT = "fix the line; where the command has --skip-bad-rows, that skips and counts such rows"
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


def _object(raw: bytes) -> dict:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line\nsave the file as UTF-8") from None
    try:
        row = strict_json.loads(text.rstrip())  # a line break left at the end would shift the reported column
    except strict_json.Ambiguous:
        raise
    except json.JSONDecodeError as error:
        one_a_line = "expected JSON objects, one a line; tables need .csv, .tsv, .parquet or .arrow as their name's end"
        hint = "" if text.startswith("{") and text.strip() != "{" else one_a_line
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}\n{hint}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested lists
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {named(row)}")
    return row


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
