"""JSON without what readers disagree on: an object that names a field twice, and text that is no valid Unicode."""

import json
from typing import Any


class Ambiguous(ValueError):
    """JSON that is well-formed, and whose meaning depends on who reads it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise Ambiguous(f"field '{_shown(twice)}': expected once in an object, got it twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def loads(text: str) -> Any:
    """`json.loads(text)`. Raises Ambiguous, besides what that raises."""
    try:  # twice as fast where no white space surrounds the value, as in nearly every line
        value, end = _DECODER.raw_decode(text)
    except Ambiguous:
        raise
    except ValueError:
        end = -1
    if end != len(text):
        value = _DECODER.decode(text)
    return checked(value, text)


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """(the value that begins at `at`, where it ends). Raises as `loads`."""
    value, end = _DECODER.raw_decode(text, at)
    return checked(value, text[at:end]), end


def checked(value: Any, text: str) -> Any:
    """A value that was read from `text`. Raises Ambiguous for a lone surrogate, which only an escape can spell."""
    if "\\ud" in text or "\\uD" in text:
        _require_unicode(value, "")
    return value


def _require_unicode(value: Any, field: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            place = f"field '{field}': " if field else ""
            raise Ambiguous(f"{place}expected valid Unicode, got the lone surrogate {value[error.start]!a}") from None
    elif isinstance(value, dict):
        for name, item in value.items():
            inside = f"{field}.{_shown(name)}" if field else _shown(name)
            _require_unicode(name, inside)
            _require_unicode(item, inside)
    elif isinstance(value, list):
        for n, item in enumerate(value):
            _require_unicode(item, f"{field}[{n}]")


def _shown(name: str) -> str:
    """A field's name for a message, which must be valid Unicode."""
    shown = name.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= 48 else f"{shown[:45]}..."
