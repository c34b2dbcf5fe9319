"""--columns: which columns of a file hold the fields that a command reads."""

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike

from ..errors import InputError, closest
from ..log import say
from . import strict_json
from .fields import BadRow
from .jsonl import named

FIELDS = (
    "prompt completion chosen rejected messages text reference system input instruction history conversations tools "
    "chat_template_kwargs prompt_id k finish score margin temperature step chosen_score rejected_score weight label "
    "chosen_share a b preferred"
).split()
NOTATION = "FIELD=COLUMN,..."
_JSON = 'expected a JSON object of columns, or lists of columns, such as {"prompt": ["title, long", "body"]}'

Columns = Mapping[str, tuple[str, ...]]  # field -> the columns that it is made of


def parse_columns(text: str | None) -> Columns:
    """The fields that `--columns FIELD=COLUMN,...` maps; COLUMN may be several that `+` joins.

    A JSON object maps columns whose names have a comma, an equals sign or a plus in them.
    Raises InputError for another notation, an unknown field, and one that is given twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    items = _of_json(text) if text and text.lstrip().startswith("{") else _of_list(text)
    for field, names in items:
        if field not in FIELDS:
            near = closest(field, FIELDS)
            hint = f"did you mean {near}?" if near else f"the fields are {', '.join(FIELDS)}"
            raise InputError(f"--columns {text}: {field!r} is not a field", hint)
        if field in found:
            raise InputError(f"--columns {text}: {field!r} is given twice", "join columns with +, as in prompt=a+b")
        found[field] = names
    return found


def _of_list(text: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    for item in (text or "").split(","):
        if not item.strip() and not text:
            continue
        field, _, columns = (part.strip() for part in item.partition("="))
        names = tuple(name.strip() for name in columns.split("+"))
        if not field or not all(names):
            hint = f"expected {NOTATION}, such as prompt=question or prompt=context+question"
            raise InputError(f"--columns {text}: {item.strip() or 'nothing'!r} is not FIELD=COLUMN", hint)
        yield field, names


def _of_json(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    try:
        found = strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--columns {text}: broken JSON: {error}", _JSON) from None
    if not found:
        raise InputError(f"--columns {text}: no column is named", _JSON)
    for field, columns in found.items():
        names = columns if isinstance(columns, list) else [columns]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"--columns {text}: '{field}': {named(columns)} is no column", _JSON)
        yield field, tuple(names)


def apply_columns(columns: Columns, row: dict) -> dict:
    """The row with its fields made of their columns, which are taken out. Absent columns leave a field as it is.

    Several columns are joined by line breaks, without blank ones. Raises BadRow where one of several is not text.
    """
    made = {}
    for field, names in columns.items():
        values = [row[name] for name in names if row.get(name) is not None]
        if len(names) == 1 and values:
            made[field] = values[0]
        elif values:
            for name, value in zip((name for name in names if row.get(name) is not None), values, strict=True):
                if not isinstance(value, str):
                    raise BadRow(name, f"text, to be joined to '{field}'", named(value))
            made[field] = "\n".join(value for value in values if value.strip())
    used = {name for field in made for name in columns[field]}
    return {name: value for name, value in row.items() if name not in used} | made


_NOT_OF = {"prompts": ("chosen", "rejected", "completion", "text"), "completions": ("chosen", "rejected", "text")}
_NOT_OF["samples"] = _NOT_OF["completions"]


def check_columns(columns: Columns, row: dict, path: str | PathLike, kind: str) -> None:
    """Say which columns a file lacks, by its first row; a field that is there without them is read as it is.

    Raises InputError where the file has neither the columns nor the field.
    """
    for field, names in columns.items():
        missing = [name for name in names if name not in row]
        if not missing or field in _NOT_OF.get(kind, ()):
            continue
        if field not in row:
            near = closest(missing[0], row)
            hint = f"did you mean '{near}'?" if near else f"the columns are {listed(row)}"
            raise InputError(f"{path}: there is no column '{missing[0]}' (--columns)", hint)
        say(f"{path}: has no column '{missing[0]}'; its field '{field}' is read")


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in quotes, the first few of them."""
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:most]) + (" ..." if len(names) > most else "")
