"""Row files: read as a stream or at once, and checked against the schema of their kind."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from ..errors import InputError
from ..log import say, warn
from .columns import parse_columns
from .fields import BadRow
from .formats import rows_of
from .jsonl import SKIP_HINT
from .schema import Repeated, check_of
from .shapes import Shapes

_REPEATED = "repeated prompt"


@dataclass(frozen=True)
class Rows:
    """Checked rows, the line (of tables the row number) of each, and the number of rows skipped by reason.

    Of several files `path` names all, and `lines` hold text, each with its file. `by_file`: the rows of each file.
    `repeated`: rows of a prompts file that were left out since another row has their prompt. `skip_bad` says whether
    rows that prove invalid later are skipped too.
    """

    path: str
    rows: list[dict]
    lines: list[Any]
    skipped: dict[str, int]
    by_file: dict[str, int] = field(default_factory=dict)
    repeated: int = 0
    skip_bad: bool = False

    def place(self, i: int) -> str:
        """File and line of row i, for a message."""
        line = self.lines[i]
        return line if isinstance(line, str) else f"{self.path}:{line}"


def load_rows(
    path: str | PathLike,
    kind: str,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    columns: str | None = None,
) -> Rows:
    """The rows of a file (the first `limit` valid ones), checked and in their normal form.

    `path`: whatever `formats.rows_of` reads. `kind`: see `schema.check_of`.
    `columns`: the value of --columns. `prompt_id` becomes a string (the 0-based row number where prompts and
    completions have none), `k` of completions counts up within its prompt_id where absent, full dialogues in
    preferences become `prompt`/`chosen`/`rejected`, a list of messages in `text` `messages`. Raises InputError for an
    unreadable or empty file and for an invalid row, naming file, line and field; with `skip_bad` invalid rows and
    broken lines are skipped, counted by reason and reported in one warning.
    """
    skipped: Counter[str] = Counter()
    pairs = list(stream_rows(path, kind, skip_bad=skip_bad, limit=limit, columns=columns, skipped=skipped))
    repeated = skipped.pop(_REPEATED, 0)
    warn_of_skipped(path, len(pairs), skipped)
    if repeated:
        say(f"{path}: {len(pairs)} prompts; {repeated} rows repeat the prompt of another row")
    rows, lines = [row for _, row in pairs], [line for line, _ in pairs]
    return Rows(str(path), rows, lines, dict(skipped), {str(path): len(rows)}, repeated, skip_bad)


def refuse_repeated(paths: Sequence[str]) -> None:
    """Raises InputError for a file that is named twice."""
    twice = next((path for path in paths if list(paths).count(path) > 1), None)
    if twice:
        raise InputError(f"{twice}: given twice", "give each file once")


def load_files(paths: Sequence[str], kind: str, *, skip_bad: bool = False, columns: str | None = None) -> Rows:
    """The rows of one file or of several, one after the other. Raises as `load_rows`, also for a file named twice."""
    refuse_repeated(paths)
    each = [load_rows(path, kind, skip_bad=skip_bad, columns=columns) for path in paths]
    if len(each) == 1:
        return each[0]
    skipped: Counter[str] = Counter()
    for rows in each:
        skipped.update(rows.skipped)
        say(f"{rows.path}: {len(rows.rows)} rows")
    return Rows(
        ", ".join(paths),
        [row for rows in each for row in rows.rows],
        [rows.place(i) for rows in each for i in range(len(rows.rows))],
        dict(skipped),
        {rows.path: len(rows.rows) for rows in each},
        skip_bad=skip_bad,
    )


def stream_rows(  # each argument but `path` and `kind` is an option of the commands, or the count of one
    path: str | PathLike,
    kind: str,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    columns: str | None = None,
    skipped: Counter[str] | None = None,
    again: bool = False,
) -> Iterator[tuple[int, dict]]:
    """(line or row number from 1, row) one after the other, as `load_rows` returns them; text rows are held one at a
    time.

    `skipped` is counted up as invalid rows are skipped. `again`: the file was read before, so that nothing is said of
    its shape a second time.
    """
    check, shapes = check_of(kind), Shapes(path, kind, parse_columns(columns), silent=again)
    skipped = Counter() if skipped is None else skipped
    valid, number = 0, -1
    for number, (line, found) in enumerate(rows_of(path)):  # noqa: B007
        if isinstance(found, InputError):
            reason, error = "unreadable line", found
        else:
            try:
                row = check(number, shapes(found))
            except Repeated:
                skipped[_REPEATED] += 1
                continue
            except BadRow as bad:
                reason = re.sub(r"\[\d+\]", "[]", bad.problem)
                error = InputError(f"{path}:{line}: {bad}", bad.hint or SKIP_HINT)
            else:
                valid += 1
                yield line, row
                if valid == limit:
                    break
                continue
        if not skip_bad:
            raise error
        skipped[reason] += 1
    if not valid:
        what = "none of its rows can be used" if number >= 0 else "the file holds no rows"
        raise InputError(
            f"{path}: {what}{_listing(skipped)}", f"expected {kind} rows, such as JSON objects, one a line"
        )


def warn_of_skipped(path: str | PathLike, kept: int, skipped: dict[str, int]) -> None:
    """Warn of the rows skipped in a file, by reason, if there are any."""
    if skipped:
        bad = sum(skipped.values())
        warn(f"{path}: {bad} of {kept + bad} rows skipped{_listing(skipped)}")


def _listing(skipped: dict[str, int]) -> str:
    return "".join(f"; {count} x {reason}" for reason, count in skipped.items())
