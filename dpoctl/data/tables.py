"""Tables as rows: CSV and TSV, Parquet, Arrow, and data sets saved with `save_to_disk`; in batches, not at once."""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from io import TextIOWrapper
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime import pipes
from .jsonl import SKIP_HINT, Found
from .streams import bare_name, is_compressed, listing_of, opened

_BATCH = 1024  # rows of a Parquet or Arrow file in memory at a time
# In CSV every cell is text: these columns hold numbers, those JSON.
_NUMBERS = (
    *("k", "b_k", "score", "margin", "temperature", "step", "weight", "label"),
    *("chosen_share", "votes", "win_rate", "comparisons", "p"),
)
_LABELS = {"true": True, "false": False}
_NUMBER_ENDS = ("_score", "_k", "score_chosen", "score_rejected", "rating")
_MAYBE_BLANK = ("system", "system_prompt", "input")  # whose empty text says that the row has the shape with them
_JSON = ("messages", "conversations", "conversation", "tools", "chat_template_kwargs", "history", "texts")


def is_saved_dataset(path: str | PathLike) -> bool:
    """Whether a directory was written by `save_to_disk` of datasets."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


# --- CSV ---


def is_csv(path: str | PathLike) -> bool:
    """Whether the cells of a file are text, whatever they hold."""
    return bare_name(path).endswith((".csv", ".tsv"))


def csv_rows(path: str | PathLike) -> Iterator[Found]:
    """(line on which it begins, row) of each row; the first line names the columns, and an empty cell is absent.

    Cells are text. Numbers are read where the field is a number, JSON where it can only be a list or an object.
    """
    csv.field_size_limit(sys.maxsize)
    with opened(path) as stream:
        text = TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            yield from _csv_rows(path, text)
        except UnicodeDecodeError:
            raise InputError(f"{path}:{_undecodable_line(path)}: not UTF-8", "save the file as UTF-8") from None


def _csv_rows(path: str | PathLike, text: TextIOWrapper) -> Iterator[Found]:
    first = text.readline()
    while first and not first.strip():
        first = text.readline()
    if "\0" in first:
        raise InputError(f"{path}:1: not a table of text", "save it as CSV in UTF-8, or as .jsonl or .parquet")
    delimiters = ("\t",) if bare_name(path).endswith(".tsv") else (",", ";", "\t")
    delimiter = next((d for d in delimiters if d in first), ",")
    lines = csv.reader(_chain(first, text), delimiter=delimiter, strict=True)
    line = 1
    try:
        names = [name.strip() for name in next(lines, [])]
        _check_names(path, names)
        line = lines.line_num + 1
        for cells in lines:
            if len(cells) == len(names):
                yield line, {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True) if name}
            elif cells:
                problem = f"{len(cells)} cells in a table of {len(names)} columns"
                yield line, InputError(f"{path}:{line}: {problem}", f"quote cells that hold {delimiter!r}; {SKIP_HINT}")
            line = lines.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: broken CSV: {error}", "is a quote missing?") from None


def _undecodable_line(path: str | PathLike) -> int:
    """The number of the first line that is not UTF-8."""
    with opened(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _check_names(path: str | PathLike, names: list[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: two columns are named {twice[0]!r}", "rename one of them")


def _cell(name: str, cell: str) -> Any:
    if not cell:
        return "" if name in _MAYBE_BLANK else None
    return typed(name, cell)


def typed(name: str, cell: str) -> Any:
    """A cell of CSV as the value of the field or column `name`: a number, a label, JSON, or its text."""
    if name == "label" and cell.lower() in _LABELS:
        return _LABELS[cell.lower()]
    if name in _NUMBERS or name.endswith(_NUMBER_ENDS):
        for number in (int, float):
            try:
                return number(cell)
            except ValueError:
                pass
    if name in _JSON or name.endswith("_ids"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return cell


# --- Parquet and Arrow ---


def parquet_rows(path: str | PathLike) -> Iterator[Found]:
    """(row number from 1, row) of a Parquet file."""
    import pyarrow.parquet

    with _arrow_source(path) as source:
        file = pyarrow.parquet.ParquetFile(source)
        _check_names(path, file.schema_arrow.names)
        yield from enumerate(_rows(file.iter_batches(batch_size=_BATCH)), 1)


def arrow_rows(path: str | PathLike) -> Iterator[Found]:
    """(row number from 1, row) of an Arrow file, in the file or the stream format."""
    with _arrow_source(path) as source:
        yield from enumerate(_rows(_arrow_batches(path, source)), 1)


def _arrow_batches(path: str | PathLike, source: Any) -> Iterator[Any]:
    import pyarrow

    try:
        file = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        _check_names(path, stream.schema.names)
        yield from stream
    else:
        _check_names(path, file.schema.names)
        for i in range(file.num_record_batches):
            yield file.get_batch(i)


def saved_rows(path: str | PathLike) -> Iterator[Found]:
    """(row number from 1, row) of a data set in a directory that `save_to_disk` wrote.

    Raises InputError for a directory with several splits, and one whose files are missing.
    """
    number = 0
    for file in saved_files(path):
        for _, row in arrow_rows(file):
            number += 1
            yield number, row


def saved_files(path: str | PathLike) -> list[Path]:
    """The Arrow files of a saved data set, in order; of a set with one split, that split's. Raises as `saved_rows`."""
    folder = Path(path)
    if (splits := folder / "dataset_dict.json").is_file():
        names = _read_state(splits).get("splits") or []
        if not names:
            raise InputError(f"{path}: a saved data set without splits", "save it again with its rows")
        if len(names) > 1:
            hint = f"give one of {', '.join(str(folder / name) for name in names)}"
            raise InputError(f"{path}: holds {len(names)} splits", hint)
        folder = folder / names[0]
    state = _read_state(folder / "state.json")
    files = [folder / entry["filename"] for entry in state.get("_data_files") or []]
    if state.get("_indices_data_files"):
        raise InputError(f"{path}: holds a selection of rows", "call flatten_indices() before save_to_disk()")
    missing = [file for file in files if not file.is_file()]
    if missing:
        hint = "copy the directory, or save it again"
        raise InputError(f"{path}: a saved data set, but {missing[0].name} is missing", hint)
    return files


def _read_state(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        hint = "copy the directory, or save it again"
        raise InputError(f"{file}: cannot be read as the description of a saved data set", hint)
    return found


@contextmanager
def _arrow_source(path: str | PathLike) -> Iterator[Any]:
    """A file as Arrow reads it: memory-mapped, or in memory where it is compressed.

    Arrow's errors about the file's content, also inside the block, become InputError.
    """
    import pyarrow

    compressed = is_compressed(path)
    try:
        if compressed:
            with opened(path) as stream:
                yield pyarrow.BufferReader(stream.read())
        else:
            with pyarrow.memory_map(str(pipes.readable(path))) as source:
                yield source
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        hint = "check that the file is complete and has the format of its name"
        raise InputError(f"{path}: cannot be read ({reason})", hint) from None


def _rows(batches: Iterable[Any]) -> Iterator[dict]:
    """The batches' rows as JSON would hold them."""
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(start, _BATCH).to_pylist():
                yield as_json(row)


def as_json(row: dict) -> dict:
    """A table's row as a JSON file would hold it: nested objects without the null fields that a table fills in."""
    return {str(name): _json_value(value) for name, value in row.items()}


def _json_value(value: Any) -> Any:
    """The value; dates and decimals as text and numbers, bytes as text, and None for what JSON cannot hold."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): _json_value(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes):  # a text column of some writers
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, (date, time, timedelta)):
        return str(value)
    return float(value) if isinstance(value, Decimal) else None


def describe_directory(path: str | PathLike) -> InputError:
    """The error for a directory that is not a saved data set."""
    hint = f"{listing_of(Path(path))}; hub:{os.fspath(path).rstrip('/')} reads the files of a split as one data set"
    return InputError(f"{path}: a directory, expected a file of rows or a saved data set", hint)
