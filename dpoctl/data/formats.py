"""Rows of a file in any format that people keep them in: a table from the file's name to its reader."""

import os
from collections.abc import Callable, Iterator
from os import PathLike

from ..runtime.hub_data import is_hub_data
from .columns import FIELDS
from .documents import is_one_object, list_rows, object_rows
from .jsonl import Found, jsonl_rows
from .streams import bare_name, opened
from .tables import arrow_rows, csv_rows, describe_directory, is_saved_dataset, parquet_rows, saved_rows

Reader = Callable[[str | PathLike], Iterator[Found]]

FORMATS: dict[str, Reader] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
_MAGIC = ((b"PAR1", parquet_rows), (b"ARROW1", arrow_rows))
_SNIFFED = 4096  # bytes at the beginning of a file in which a list shows itself


def rows_of(path: str | PathLike) -> Iterator[Found]:
    """(line or row number from 1, row) of each row of an input, or (number, error) where a row cannot be read.

    `path`: a file of JSON lines, a JSON list, an object with one, CSV, TSV, Parquet or Arrow, plain,
    gzip or zstd; a directory of `save_to_disk`; `hub:NAME`; or a pipe.
    Raises InputError where nothing can be read of it.
    """
    return reader_of(path)(path)


def reader_of(path: str | PathLike) -> Reader:
    """The reader for an input: by its kind, then its name, then its first bytes."""
    if is_hub_data(path):
        from .hub import hub_rows

        return lambda each: hub_rows(os.fspath(each))
    if os.path.isdir(path):
        if not is_saved_dataset(path):
            raise describe_directory(path)
        return saved_rows
    named = next((reader for end, reader in FORMATS.items() if bare_name(path).endswith(end)), None)
    return named or _by_content(path)


def _by_content(path: str | PathLike) -> Reader:
    with opened(path) as stream:
        start = stream.read(_SNIFFED)
    for magic, reader in _MAGIC:
        if start.startswith(magic):
            return reader
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"]", b""):
        return list_rows
    if text.startswith(b"{") and is_one_object(path, FIELDS):
        return lambda each: object_rows(each, FIELDS)
    return jsonl_rows
