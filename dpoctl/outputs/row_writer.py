"""A JSONL output that grows batch by batch as FILE.partial and is renamed when it is complete.

After each batch the sizes and SHA-256 sums of the partial files and the running counts are appended to FILE.progress. A
stopped or killed command resumes after the last batch whose bytes are intact, whatever was written or lost after it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from .. import log
from ..errors import OutputInUse
from ..runtime import signals
from .claims import Output, remove_unfinished
from .files import is_intact, json_line, running_sha256, seal, sync_directory, writing
from .locks import lock

_AT_START: dict[str, Any] = {"batches": 0, "state": {}}


class RowLog:
    """Row files that grow together, batch by batch; `batches_done` and `state` say where to resume.

    What earlier runs left is removed if the output does not resume. Raises OutputInUse where another process is writing
    one of the files, StorageError where they cannot be written.
    """

    def __init__(self, output: Output, paths: list[Path]):
        self.output, self.paths = output, paths
        self.progress_path = paths[0].with_name(paths[0].name + ".progress")
        entry, end = self._last_intact_batch() if output.resuming else (_AT_START, 0)
        zeros = [0] * len(self.paths)
        self.batches_done, self.state, self.rows = entry["batches"], entry["state"], list(entry.get("rows", zeros))
        with writing(self.progress_path):
            self._files = [self._open(p, size) for p, size in zip(self.paths, entry.get("sizes", zeros), strict=True)]
            self._sums = [_sum_from_start(f) for f in self._files]
            self._progress = _open_at(self.progress_path, end)
        output.opened.callback(_close, self._progress)
        if self.batches_done:
            log.say(f"{paths[0]}: resuming after {self.rows[0]} rows")

    def _partial(self, path: Path) -> Path:
        return path.with_name(path.name + ".partial")

    def _current(self, path: Path) -> Path:
        """Where the rows are: already under the final name, where a kill came between the renames and the manifest."""
        return path if path.exists() and not self._partial(path).exists() else self._partial(path)

    def _last_intact_batch(self) -> tuple[dict[str, Any], int]:
        """(entry, its end in the progress file) of the last batch up to which every row file matches its sums."""
        entries = []
        end = 0
        with suppress(OSError):
            for line in self.progress_path.read_bytes().splitlines(keepends=True):
                end += len(line)
                with suppress(ValueError):
                    entry = json.loads(line)
                    known = isinstance(entry, dict) and len(entry.get("sha256", ())) == len(self.paths)
                    if known and is_intact(entry):
                        entries.append((entry, end))
        sums_of = [_sums_at(self._current(p), [e["sizes"][i] for e, _ in entries]) for i, p in enumerate(self.paths)]
        intact = [
            (entry, end)
            for entry, end in entries
            if [sums.get(size) for sums, size in zip(sums_of, entry["sizes"], strict=True)] == entry["sha256"]
        ]
        last = intact[-1] if intact else (_AT_START, 0)
        if entries and last[0] is not entries[-1][0]:
            log.warn(f"{self.paths[0]}: rows after batch {last[0]['batches']} were damaged and are written again")
        return last

    def _open(self, path: Path, size: int) -> BinaryIO:
        partial = self._partial(path)
        if size and not partial.exists():
            os.replace(path, partial)
        f: BinaryIO = open(partial, "r+b" if partial.exists() else "w+b")
        self.output.opened.callback(_close, f)
        lock(f.fileno(), str(path), "file")
        try:
            same = os.stat(partial).st_ino == os.fstat(f.fileno()).st_ino
        except FileNotFoundError:
            same = False
        if not same:  # another process completed or removed it between our open and our lock
            raise OutputInUse(f"{path}: another dpoctl process was writing it", hint="rerun the command")
        f.truncate(size)
        f.seek(size)
        return f

    def write_batch(self, *row_lists: Iterable[dict[str, Any]], state: dict[str, Any]) -> None:
        """Append a batch's rows to each file and record them as complete.

        `state`: JSON values that a resumed command gets back. Raises Interrupted where a signal has arrived.
        """
        for i, (f, rows) in enumerate(zip(self._files, row_lists, strict=True)):
            lines = [json_line(row) for row in rows]
            data = "".join(lines).encode()
            with writing(self._partial(self.paths[i]), len(data)):
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            self._sums[i].update(data)
            self.rows[i] += len(lines)
        self.batches_done += 1
        self.state = state
        entry = {
            "batches": self.batches_done,
            "sizes": [f.tell() for f in self._files],
            "rows": self.rows,
            "state": state,
        }
        line = json_line(seal(entry | {"sha256": [s.hexdigest() for s in self._sums]}))
        with writing(self.progress_path, len(line)):
            self._progress.write(line.encode())
            self._progress.flush()
            os.fsync(self._progress.fileno())
        if self.output.answers is not None:
            self.output.answers.forget()
        signals.at_boundary(f"{self.rows[0]} rows, which are kept")


class RowWriter(RowLog):
    """Writes the row files of an output; `further` are paths of row files beside --out, of which None is skipped."""

    def __init__(self, output: Output, *further: str | None):
        paths = [output.out, *(Path(p) for p in further if p)]
        for path in paths[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(output, paths)

    def finish(self, metrics: dict[str, Any], cost: dict[str, Any], shard: dict[str, Any] | None = None) -> None:
        """Rename the files into place, then write the manifest; `shard` says which part of a larger output they are."""
        for f, path in zip(self._files, self.paths, strict=True):
            os.replace(self._partial(path), path)
            f.close()
            sync_directory(path.parent)
        self._progress.close()
        self.output.finish([(p, n) for p, n in zip(self.paths, self.rows, strict=True)], metrics, cost, shard)
        remove_unfinished(self.output.out)


class KeptRows(RowLog):
    """Rows that an unfinished output needs again, in FILE.samples.partial beside it; its RowWriter removes them."""

    def __init__(self, output: Output):
        super().__init__(output, [output.out.with_name(output.out.name + ".samples")])

    def read(self, first: int = 0) -> Iterator[dict[str, Any]]:
        """The rows that have been written, from number `first` on."""
        with open(self._partial(self.paths[0]), "rb") as f:
            for line in islice(f, first, self.rows[0]):
                yield json.loads(line)


def _open_at(path: Path, size: int) -> BinaryIO:
    """A file cut to `size` bytes and open for appending."""
    f = open(path, "r+b" if path.exists() else "w+b")
    f.truncate(size)
    f.seek(size)
    return f


def _close(f: BinaryIO) -> None:
    with suppress(OSError):  # what could not be written, an error has told
        f.close()


def _sum_from_start(f: BinaryIO) -> "hashlib._Hash":
    f.seek(0)
    return running_sha256(f)


def _sums_at(path: Path, sizes: list[int]) -> dict[int, str]:
    """size -> SHA-256 of a file's first `size` bytes, for those sizes that the file reaches."""
    digest, found, at = hashlib.sha256(), {}, 0
    with suppress(OSError), open(path, "rb") as f:
        for size in sorted(set(sizes)):
            while at < size and (block := f.read(min(1 << 20, size - at))):
                digest.update(block)
                at += len(block)
            if at == size:
                found[size] = digest.hexdigest()
    return found
