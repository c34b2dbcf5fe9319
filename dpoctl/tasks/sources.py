"""Rows of a task from the hub, or the same rows in a file on disk."""

from collections.abc import Iterator
from pathlib import Path

from ..data.jsonl import read_jsonl
from ..errors import InputError


def source_rows(
    source: str | None, hub_id: str, *, name: str | None = None, split: str = "train", revision: str | None = None
) -> Iterator[tuple[int, dict]]:
    """(1-based line or row number, row) of a file, or of a data set's split on the hub where `source` is None.

    Files: .jsonl, .jsonl.gz, .csv, .parquet. Raises InputError where one cannot be read or the hub is out of reach.
    """
    if source and source.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(source)
        return
    if source and not source.endswith((".csv", ".parquet")):
        raise InputError(
            f"{source}: not a kind of file that is read", hint="--source takes .jsonl, .jsonl.gz, .csv, .parquet"
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        if source is None:
            table = datasets.load_dataset(hub_id, name, split=split, revision=revision)
        else:
            table = datasets.load_dataset(Path(source).suffix[1:], data_files=source, split="train")
    except Exception as e:  # datasets and the hub client raise dozens of kinds, all the same to the user
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if source is None:
            hint = "is the hub in reach? --source FILE reads the same rows from disk"
            raise InputError(f"{hub_id}: cannot be loaded ({reason})", hint=hint) from None
        raise InputError(f"{source}: cannot be read ({reason})", hint="is the file whole?") from None
    yield from enumerate(table, start=2 if source and source.endswith(".csv") else 1)


def text_of(row: dict, column: str, place: str) -> str:
    """A column's text. Raises InputError with the place, the column and what there is instead."""
    value = row.get(column)
    if not isinstance(value, str):
        got = type(value).__name__ if column in row else "no such column"
        hint = f"the columns are {', '.join(map(str, row))}"
        raise InputError(f"{place}: {column}: expected a text, got {got}", hint=hint)
    return value
