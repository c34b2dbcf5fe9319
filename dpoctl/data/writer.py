"""A JSONL output that grows as FILE.partial, wave by wave, and is renamed when complete.

After every wave the sizes of the partial files and the running counts go to FILE.progress, so that a stopped or killed
command continues behind the last whole wave, whatever happened to the bytes after it.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import log
from ..artifacts import Work, sync_directory


class WaveWriter:
    """Writes one or more row files of a work in waves; `waves_done` and `state` say where to go on."""

    def __init__(self, work: Work, *further: str | None):
        self.work = work
        self.paths = [work.out, *(Path(p) for p in further if p)]
        for path in self.paths[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.progress_path = work.out.with_name(work.out.name + ".progress")
        self.waves_done, self.state, sizes, rows = self._last_whole_wave() if work.resuming else (0, {}, None, None)
        self.rows = rows or [0] * len(self.paths)
        self._files = [self._open(p, size) for p, size in zip(self.paths, sizes or [0] * len(self.paths), strict=True)]
        self._progress = open(self.progress_path, "a" if self.waves_done else "w", encoding="utf-8")
        if self.waves_done:
            log.say(f"{work.out}: continues behind {self.rows[0]} rows")

    def _partial(self, path: Path) -> Path:
        return path.with_name(path.name + ".partial")

    def _last_whole_wave(self) -> tuple[int, dict, list[int] | None, list[int] | None]:
        held = [self._partial(p).stat().st_size if self._partial(p).exists() else 0 for p in self.paths]
        best: tuple[int, dict, list[int] | None, list[int] | None] = (0, {}, None, None)
        with suppress(OSError):
            for line in self.progress_path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError):
                    entry = json.loads(line)
                    if all(size <= have for size, have in zip(entry["sizes"], held, strict=True)):
                        best = (entry["waves"], entry["state"], entry["sizes"], entry["rows"])
        return best

    def _open(self, path: Path, size: int):
        f = open(self._partial(path), "r+b" if self._partial(path).exists() else "w+b")
        f.truncate(size)
        f.seek(size)
        return f

    def write_wave(self, *row_lists: Iterable[dict[str, Any]], state: dict[str, Any]) -> None:
        """Append a wave's rows to each file and record that the wave is whole."""
        for i, (f, rows) in enumerate(zip(self._files, row_lists, strict=True)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            f.write("".join(lines).encode())
            f.flush()
            os.fsync(f.fileno())
            self.rows[i] += len(lines)
        self.waves_done += 1
        self.state = state
        entry = {"waves": self.waves_done, "sizes": [f.tell() for f in self._files], "rows": self.rows, "state": state}
        self._progress.write(json.dumps(entry) + "\n")
        self._progress.flush()
        os.fsync(self._progress.fileno())

    def finish(self, figures: dict[str, Any], cost: dict[str, Any]) -> None:
        """Rename the files into place, then write the manifest."""
        for f, path in zip(self._files, self.paths, strict=True):
            f.close()
            os.replace(self._partial(path), path)
            sync_directory(path.parent)
        self._progress.close()
        self.work.finish([(p, n) for p, n in zip(self.paths, self.rows, strict=True)], figures, cost)
        self.progress_path.unlink(missing_ok=True)
