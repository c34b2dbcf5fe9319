"""A task's source rows, from the Hub or from a file with the same columns."""

from collections.abc import Iterator
from pathlib import Path

from ..data.jsonl import read_jsonl
from ..errors import InputError
from ..models.hub import hub_problem


def source_rows(
    source: str | None, hub_id: str, *, name: str | None = None, split: str = "train", revision: str | None = None
) -> Iterator[tuple[int, dict]]:
    """(1-based line or row number, row) of the file `source`, or of a split of `hub_id` where `source` is None.

    `name` is the data set's configuration on the Hub. Files: .jsonl, .jsonl.gz, .csv, .parquet. Raises InputError
    where one cannot be read or the Hub cannot be reached.
    """
    if source and source.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(source)
        return
    if source and not source.endswith((".csv", ".parquet")):
        raise InputError(f"{source}: unsupported format", hint="--source takes .jsonl, .jsonl.gz, .csv, .parquet")
    import datasets

    datasets.disable_progress_bars()
    try:
        if source is None:
            table = datasets.load_dataset(hub_id, name, split=split, revision=revision)
        else:
            table = datasets.load_dataset(Path(source).suffix[1:], data_files=source, split="train")
    except Exception as e:  # datasets and the Hub client raise dozens of types, which call for the same answer
        if source is None:
            problem, hint = hub_problem(e, revision)
            raise InputError(f"{hub_id}: {problem}", f"{hint}; --source reads the same rows from a file") from None
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{source}: cannot be read ({reason})", hint="check that the file is complete") from None
    yield from enumerate(table, start=2 if source and source.endswith(".csv") else 1)


def text_of(row: dict, column: str, place: str) -> str:
    """The text in a column. Raises InputError naming `place`, the column and what it holds instead."""
    value = row.get(column)
    if not isinstance(value, str):
        got = type(value).__name__ if column in row else "no such column"
        hint = f"the columns are {', '.join(map(str, row))}"
        raise InputError(f"{place}: {column}: expected a text, got {got}", hint=hint)
    return value
