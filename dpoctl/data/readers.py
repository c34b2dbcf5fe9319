"""Row files: read as a stream or at once, and checked against the schema of their kind."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike

from ..errors import InputError
from ..log import warn
from .fields import BadRow
from .jsonl import SKIP_HINT, objects
from .schema import check_of


@dataclass(frozen=True)
class Rows:
    """A file's checked rows, the 1-based line of each, and the number of rows skipped by reason.

    `skip_bad` says whether rows that prove invalid later are skipped too.
    """

    path: str
    rows: list[dict]
    lines: list[int]
    skipped: dict[str, int]
    skip_bad: bool = False


def load_rows(path: str | PathLike, kind: str, *, skip_bad: bool = False, limit: int | None = None) -> Rows:
    """The rows of a JSONL file (the first `limit` valid ones), checked and in their normal form.

    `kind` is text, prompts, completions, preferences or evaluations. `prompt_id` becomes a string (the 0-based row
    number where prompts and completions have none), `k` of completions counts up within its prompt_id where absent,
    full dialogues in preferences become `prompt`/`chosen`/`rejected`, a list of messages in `text` `messages`.
    Raises InputError for an unreadable or empty file and for an invalid row, naming file, line and field; with
    `skip_bad` invalid rows and broken lines are skipped, counted by reason and reported in one warning.
    """
    skipped: Counter[str] = Counter()
    pairs = list(stream_rows(path, kind, skip_bad=skip_bad, limit=limit, skipped=skipped))
    warn_of_skipped(path, len(pairs), skipped)
    return Rows(str(path), [row for _, row in pairs], [line for line, _ in pairs], dict(skipped), skip_bad)


def stream_rows(
    path: str | PathLike,
    kind: str,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[tuple[int, dict]]:
    """(1-based line, row) one after the other, as `load_rows` returns them; text rows are held one at a time.

    `skipped` is counted up as invalid rows are skipped.
    """
    check = check_of(kind)
    skipped = Counter() if skipped is None else skipped
    valid, number = 0, -1
    for number, (line, found) in enumerate(objects(path)):  # noqa: B007
        if isinstance(found, InputError):
            reason, error = "unreadable line", found
        else:
            try:
                row = check(number, found)
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
        raise InputError(f"{path}: {what}{_listing(skipped)}", f"expected {kind} rows: JSON objects, one a line")


def warn_of_skipped(path: str | PathLike, kept: int, skipped: dict[str, int]) -> None:
    """Warn of the rows skipped in a file, by reason, if there are any."""
    if skipped:
        bad = sum(skipped.values())
        warn(f"{path}: {bad} of {kept + bad} rows skipped{_listing(skipped)}")


def _listing(skipped: dict[str, int]) -> str:
    return "".join(f"; {count} x {reason}" for reason, count in skipped.items())
