"""JSONL files, plain or gzipped, line by line."""

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import InputError

_DECODER = json.JSONDecoder()
SKIP_HINT = "fix the line, or skip and count such rows with --skip-bad-rows"


def read_jsonl(path: str | PathLike) -> Iterator[tuple[int, dict]]:
    """(1-based line, object) of each line of a .jsonl or gzipped file.

    Blank lines, a byte order mark and CRLF are tolerated. Raises InputError for a missing or unreadable file, truncated
    gzip, bytes that are not UTF-8, broken JSON, and JSON that is not an object.
    """
    for line, found in objects(path):
        if isinstance(found, InputError):
            raise found
        yield line, found


def objects(path: str | PathLike) -> Iterator[tuple[int, dict | InputError]]:
    """(line, object) of each line, or (line, error) where the line cannot be read. Raises as `read_jsonl` otherwise."""
    for line, raw in _lines(Path(path)):
        try:
            row = _object(raw)
        except ValueError as error:
            message, _, hint = str(error).partition("\n")
            if line == 1 and Path(path).suffix in (".csv", ".tsv", ".txt", ".parquet", ".arrow", ".json"):
                hint = "expected a .jsonl file: JSON objects, one a line"
            yield line, InputError(f"{path}:{line}: {message}", hint or SKIP_HINT)
        else:
            yield line, row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            compressed = file.peek(2)[:2] == b"\x1f\x8b"
            stream: Iterable[bytes] = gzip.open(file) if compressed else file
            for line, raw in enumerate(stream, 1):
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield line, raw
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", _nearest_file(path)) from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, expected a .jsonl file", _listing_of(path)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        hint = "the file is truncated or damaged: copy it or write it again"
        raise InputError(f"{path}: broken gzip data: {error}", hint) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


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


def _nearest_file(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f"there is no directory {path.parent}"
    near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
    return f"did you mean {path.parent / near[0]}?" if near else _listing_of(path.parent)


def _listing_of(folder: Path) -> str:
    names = sorted(name for name in _names(folder) if name.endswith((".jsonl", ".jsonl.gz")))
    return f"{folder} holds {', '.join(names[:8])}" if names else f"{folder} holds no .jsonl file"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # no permission: the hint does without names
        return []


def named(value: Any) -> str:
    """A value for an error message: shortened, and an array or object by its type and size."""
    if value is None:
        return "nothing"
    if isinstance(value, (list, dict)) and value:
        return f"a JSON {'array' if isinstance(value, list) else 'object'} of {len(value)}"
    shown = json.dumps(value)
    return shown if len(shown) <= 48 else f"{shown[:45]}..."
