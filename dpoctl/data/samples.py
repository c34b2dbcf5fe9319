"""Samples of prompts from one file or several, whatever wrote them, grouped by prompt.

The files are read twice: once to find out which rows belong together, then group by group, so that only the rows of
unfinished groups are in memory. Of files that hold the prompts in one order these are few.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import log
from ..errors import InputError
from .duplicates import prompt_key
from .jsonl import SKIP_HINT
from .readers import refuse_repeated, stream_rows, warn_of_skipped
from .stored import ID_FIELDS, carried, stored_completion

_LEFT_OUT = -1
_NO_SCORE, _OTHER_PROMPT = "no score", "another prompt for a prompt_id"


@dataclass(frozen=True)
class Reading:
    """How files are read: the options of a command. `scored`: every row must have a `score`."""

    skip_bad: bool = False
    columns: str | None = None
    limit: int | None = None  # of the prompts
    scored: bool = False


class SampleFiles:
    """The samples of all files, of each prompt together, in the order in which prompts and samples appear.

    Rows belong to one prompt where their `prompt_id` is the same; one without a prompt_id belongs to the first prompt
    with its text, tools and template arguments. `ids`: the prompt_id of each prompt, 16 hex digits of its hash where
    no row has one. `sizes`: its number of samples. `skipped`: invalid rows by reason.
    """

    def __init__(self, paths: Sequence[str], reading: Reading):
        """Raises InputError for unreadable files and invalid rows, as `load_rows` does; for a prompt_id with two
        prompts, a missing score, and a file that is given twice."""
        refuse_repeated(paths)
        self.paths, self.reading = paths, reading
        self.ids: list[str] = []
        self.sizes: list[int] = []
        self.skipped: Counter[str] = Counter()
        self.ids_not_used = 0  # of the samples read so far, whose texts were edited
        index = _Index(reading.limit)
        self.members = [self._read(path, index) for path in paths]
        self.ids = [name or key.hex()[:16] for name, key in zip(index.names, index.keys, strict=True)]
        self.sizes = [0] * len(self.ids)
        for members in self.members:
            for group, count in Counter(members).items():
                if group != _LEFT_OUT:
                    self.sizes[group] += count

    def _read(self, path: str, index: "_Index") -> array:
        """The number of the prompt of each valid row of a file; _LEFT_OUT where it is not used."""
        members, skipped, reading = array("l"), Counter[str](), self.reading
        rows = stream_rows(path, "samples", skip_bad=reading.skip_bad, columns=reading.columns, skipped=skipped)
        for line, row in rows:
            unscored = reading.scored and row.get("score") is None
            group = None if unscored else index.group_of(row)
            problem = _NO_SCORE if unscored else _OTHER_PROMPT if group is None else ""
            if problem and not reading.skip_bad:
                raise self._error(f"{path}:{line}", row, problem)
            if problem:
                skipped[problem] += 1
            members.append(_LEFT_OUT if group is None else group)
        warn_of_skipped(path, sum(group != _LEFT_OUT for group in members), skipped)
        self.skipped.update(skipped)
        return members

    def _error(self, place: str, row: dict, problem: str) -> InputError:
        if problem == _OTHER_PROMPT:
            message = f"field 'prompt': another one for prompt_id {row['prompt_id']!r}, of this or another file"
            return InputError(f"{place}: {message}", "samples of one prompt_id are samples of one prompt")
        return InputError(
            f"{place}: field 'score': missing", f"give --scorer, which scores the samples; or {SKIP_HINT}"
        )

    def require_pairs(self) -> None:
        """Raises InputError where no prompt has two samples; says how many have one."""
        single = sum(size < 2 for size in self.sizes)
        if single == len(self.sizes):
            raise InputError(
                f"{', '.join(self.paths)}: no prompt has two samples, so there are no pairs",
                "samples of one prompt share its prompt_id, or without one its text",
            )
        if single:
            log.say(f"{', '.join(self.paths)}: {single} of {len(self.sizes)} prompts have one sample, and no pair")

    def batches(self, samples: int) -> list[slice]:
        """Slices of consecutive prompts, each with at least `samples` samples but the last."""
        found, start, held = [], 0, 0
        for number, size in enumerate(self.sizes, 1):
            held += size
            if held >= samples:
                found.append(slice(start, number))
                start, held = number, 0
        return [*found, slice(start, len(self.sizes))] if start < len(self.sizes) else found

    def groups(self, part: slice) -> Iterator[list[dict]]:
        """The samples of each prompt of a slice, with distinct `k`; the files' own is `source_k` where it is another.

        Token ids are left out where they are not those of the row's texts.
        """
        readers = [_Reader(self, n, part) for n in range(len(self.paths))]
        for group in range(part.start, part.stop):
            rows = [row for reader in readers for row in reader.rows_of(group)]
            yield _numbered([row | {"prompt_id": self.ids[group]} for row in rows])

    def checked(self, row: dict) -> dict:
        """The row, without token ids that are not those of its texts."""
        if all(row.get(name) is None for name in ID_FIELDS):
            return carried(row)
        tokenizer, texts = row.get("tokenizer"), row.get("texts")
        if isinstance(tokenizer, str) and isinstance(texts, list) and stored_completion(row, "completion", tokenizer):
            return row
        self.ids_not_used += 1
        return carried(row)


class _Reader:
    """The rows of one file by prompt, for prompts that are asked for in order."""

    def __init__(self, files: SampleFiles, number: int, part: slice):
        self.files, self.part = files, part
        reading, members = files.reading, files.members[number]
        rows = stream_rows(
            files.paths[number], "samples", skip_bad=reading.skip_bad, columns=reading.columns, again=True
        )
        self.rows = zip(members, rows, strict=False)
        self.left = Counter(members)
        self.waiting: dict[int, list[dict]] = {}

    def rows_of(self, group: int) -> list[dict]:
        while self.left[group]:
            other, (_, row) = next(self.rows)
            self.left[other] -= 1
            if max(group, self.part.start) <= other < self.part.stop:
                self.waiting.setdefault(other, []).append(self.files.checked(row))
        return self.waiting.pop(group, [])


class _Index:
    """The prompts found so far: `names` (None where no row has a prompt_id) and `keys`, the digests of the prompts."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.names: list[str | None] = []
        self.keys: list[bytes] = []
        self.by_name: dict[str, int] = {}
        self.by_key: dict[bytes, int] = {}

    def group_of(self, row: dict) -> int | None:
        """The number of a row's prompt; _LEFT_OUT beyond the limit; None where the prompt_id has another prompt."""
        name, key = row.get("prompt_id"), prompt_key(row)
        if name is None:
            group = self.by_key.get(key)
        elif name in self.by_name:
            group = self.by_name[name]
            return group if self.keys[group] == key else None
        else:
            group = self.by_key.get(key)
            if group is not None and self.names[group] is not None:  # equal prompts with ids of their own
                group = None
        if group is None and self.limit is not None and len(self.keys) >= self.limit:
            return _LEFT_OUT
        if group is None:
            group = len(self.keys)
            self.names.append(None)
            self.keys.append(key)
            self.by_key.setdefault(key, group)
        if name is not None:
            self.names[group], self.by_name[name] = name, group
        return group


def _numbered(rows: list[dict]) -> list[dict]:
    """The samples of a prompt, numbered from 0 where a `k` is missing or there twice."""
    ks = [row.get("k") for row in rows]
    if None not in ks and len(set(ks)) == len(ks):
        return rows
    return [row | {"k": k} | ({} if row.get("k") is None else {"source_k": row["k"]}) for k, row in enumerate(rows)]
