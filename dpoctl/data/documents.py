"""Files that hold one JSON document: a list of rows, or an object with such a list. They are held in memory as text."""

import json
from collections.abc import Collection, Generator, Iterator
from os import PathLike
from typing import Any

from ..errors import InputError
from ..log import say
from . import strict_json
from .jsonl import SKIP_HINT, Found, jsonl_rows, named
from .streams import opened

_DECODER = json.JSONDecoder()
_BOM = b"\xef\xbb\xbf"


def list_rows(path: str | PathLike) -> Iterator[Found]:
    """(line on which it begins, object) of each element of a file that holds one JSON list."""
    text = _text(path)
    place = _Place(text)
    at = yield from _elements(path, text, text.index("["), place)
    if text[at:].strip():
        raise InputError(f"{path}:{place.line(at)}: text after the end of the list", "give each list a file of its own")


def object_rows(path: str | PathLike, fields: Collection[str]) -> Iterator[Found]:
    """(line, object) of each element of the one list of objects in a file that holds one JSON object.

    `fields`: names that rows have, under which a list of objects belongs to a row. An object without a list of rows is
    a row. A file that is not one JSON object is read as JSON Lines. Raises InputError where it has several lists.
    """
    try:
        text = _text(path)
        whole = json.loads(text)
    except (InputError, ValueError, RecursionError):  # JSON Lines tell which of their lines is broken
        whole = None
    if not isinstance(whole, dict):
        yield from jsonl_rows(path)
        return
    names = [name for name, value in whole.items() if name not in fields and _is_rows(value)]
    if len(names) > 1:
        shown = ", ".join(f"'{name}'" for name in names)
        raise InputError(
            f"{path}: an object with {len(names)} lists of rows: {shown}", "save each as a file of its own"
        )
    if not names:
        yield 1, whole
        return
    say(f"{path}: the rows are those of '{names[0]}'")
    yield from _elements(path, text, _value_of(text, names[0]), _Place(text))


def is_one_object(path: str | PathLike, fields: Collection[str]) -> bool:
    """Whether a file that begins with an object seems to be one document, not JSON Lines."""
    with opened(path) as stream:
        lines = (line for line in stream if line.strip())
        first = next(lines, b"").removeprefix(_BOM)
        try:
            row = json.loads(first)
        except (ValueError, RecursionError):
            return True
        alone = isinstance(row, dict) and next(lines, None) is None
        return alone and any(name not in fields and _is_rows(value) for name, value in row.items())


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _text(path: str | PathLike) -> str:
    with opened(path) as stream:
        raw = stream.read().removeprefix(_BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8", "save the file as UTF-8") from None


def _value_of(text: str, name: str) -> int:
    """Where the value of a name begins in the text of an object; of a name given twice, the last."""
    found, at = 0, _blanks(text, text.index("{") + 1)
    while text[at] == '"':
        key, at = _DECODER.raw_decode(text, at)
        at = _blanks(text, _blanks(text, at) + 1)  # past the colon
        found = at if key == name else found
        at = _blanks(text, _DECODER.raw_decode(text, at)[1])
        at = _blanks(text, at + 1)  # past the comma
        if at >= len(text):
            break
    return found


def _elements(path: str | PathLike, text: str, start: int, place: "_Place") -> Generator[Found, None, int]:
    """The elements of the list that begins at `start`; returns the place behind it."""
    at = _blanks(text, start + 1)
    while text[at : at + 1] != "]":
        line = place.line(at)
        try:
            value, end = strict_json.decode_at(text, at)
        except strict_json.Ambiguous as error:
            value, end = InputError(f"{path}:{line}: {error}", SKIP_HINT), _DECODER.raw_decode(text, at)[1]
        except json.JSONDecodeError as error:
            hint = "the file is truncated or damaged: nothing after this place can be read"
            raise InputError(f"{path}:{place.line(error.pos)}: broken JSON: {error.msg}", hint) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{line}: broken JSON: {error}", "fix the file") from None
        if isinstance(value, dict | InputError):
            yield line, value
        else:
            yield line, InputError(f"{path}:{line}: expected a JSON object, got {named(value)}", SKIP_HINT)
        at = _blanks(text, end)
        if text[at : at + 1] == ",":
            at = _blanks(text, at + 1)
        elif text[at : at + 1] != "]":
            hint = "the file is truncated or damaged"
            raise InputError(f"{path}:{place.line(at)}: broken JSON: expected ',' or ']' after an object", hint)
    return at + 1


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
