"""A JSONL output that grows as FILE.partial, wave by wave, and is renamed when complete.

After every wave the sizes and sums of the partial files and the running counts go to FILE.progress, so that a stopped or
killed command continues behind the last wave that is whole, whatever happened to the bytes after it or before.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import log
from ..errors import InputError
from ..runtime import signals
from .claims import Output
from .files import is_whole, json_line, seal, sync_directory, writing

_NOTHING: dict[str, Any] = {"batches": 0, "state": {}}


class RowWriter:
    """Writes one or more row files of a work in waves; `waves_done` and `state` say where to go on.

    Raises InputError where another dpoctl writes one of them, StorageError where they cannot be written.
    """

    def __init__(self, output: Output, *further: str | None):
        self.output = output
        self.paths = [output.out, *(Path(p) for p in further if p)]
        for path in self.paths[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.progress_path = output.out.with_name(output.out.name + ".progress")
        entry, end = self._last_whole_batch() if output.resuming else (_NOTHING, 0)
        none = [0] * len(self.paths)
        self.batches_done, self.state, self.rows = entry["batches"], entry["state"], list(entry.get("rows", none))
        with writing(self.progress_path):
            self._files = [self._open(p, size) for p, size in zip(self.paths, entry.get("sizes", none), strict=True)]
            self._sums = [_sum_of(f) for f in self._files]
            self._progress = _cut(self.progress_path, end)
        if self.batches_done:
            log.say(f"{output.out}: continues behind {self.rows[0]} rows")

    def _partial(self, path: Path) -> Path:
        return path.with_name(path.name + ".partial")

    def _held(self, path: Path) -> Path:
        """Where a file's rows are: under its own name already, where a kill came between the renames and the manifest."""
        return path if path.exists() and not self._partial(path).exists() else self._partial(path)

    def _last_whole_batch(self) -> tuple[dict[str, Any], int]:
        """(entry, its end in the progress file) of the last wave whose rows are all there, by their sums."""
        entries = []
        end = 0
        with suppress(OSError):
            for line in self.progress_path.read_bytes().splitlines(keepends=True):
                end += len(line)
                with suppress(ValueError):
                    entry = json.loads(line)
                    known = isinstance(entry, dict) and len(entry.get("sha256", ())) == len(self.paths)
                    if known and is_whole(entry):
                        entries.append((entry, end))
        held = [_sums_at(self._held(p), [e["sizes"][i] for e, _ in entries]) for i, p in enumerate(self.paths)]
        whole = [
            (entry, end)
            for entry, end in entries
            if [sums.get(size) for sums, size in zip(held, entry["sizes"], strict=True)] == entry["sha256"]
        ]
        if entries and (not whole or whole[-1] is not entries[-1]):
            log.warn(
                f"{self.output.out}: rows behind wave {whole[-1][0]['batches'] if whole else 0} were damaged: made again"
            )
        return whole[-1] if whole else (_NOTHING, 0)

    def _open(self, path: Path, size: int):
        partial = self._partial(path)
        if size and not partial.exists():
            os.replace(path, partial)
        f = open(partial, "r+b" if partial.exists() else "w+b")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.stat(partial).st_ino == os.fstat(f.fileno()).st_ino
        except OSError:
            ours = False
        if not ours:
            raise InputError(f"{path}: another dpoctl is writing it", hint="wait for it, or name another file")
        f.truncate(size)
        f.seek(size)
        return f

    def write_batch(self, *row_lists: Iterable[dict[str, Any]], state: dict[str, Any]) -> None:
        """Append a wave's rows to each file and record that the wave is whole; then stop, where a signal has come."""
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
        signals.at_boundary(f"{self.rows[0]} rows, which are kept")

    def finish(self, metrics: dict[str, Any], cost: dict[str, Any], shard: dict[str, Any] | None = None) -> None:
        """Rename the files into place, then write the manifest; `shard` says which part of a larger work they are."""
        for f, path in zip(self._files, self.paths, strict=True):
            os.replace(self._partial(path), path)
            f.close()
            sync_directory(path.parent)
        self._progress.close()
        self.output.finish([(p, n) for p, n in zip(self.paths, self.rows, strict=True)], metrics, cost, shard)
        self.progress_path.unlink(missing_ok=True)


def _cut(path: Path, size: int):
    """A file opened to go on at `size`; what stood behind is gone."""
    f = open(path, "r+b" if path.exists() else "w+b")
    f.truncate(size)
    f.seek(size)
    return f


def _sum_of(f):
    """The running SHA-256 of what an open file holds."""
    digest = hashlib.sha256()
    f.seek(0)
    while block := f.read(1 << 20):
        digest.update(block)
    return digest


def _sums_at(path: Path, sizes: list[int]) -> dict[int, str]:
    """size -> SHA-256 of so many first bytes of a file, for the sizes that it has."""
    digest, found, at = hashlib.sha256(), {}, 0
    with suppress(OSError), open(path, "rb") as f:
        for size in sorted(set(sizes)):
            while at < size and (block := f.read(min(1 << 20, size - at))):
                digest.update(block)
                at += len(block)
            if at == size:
                found[size] = digest.hexdigest()
    return found
