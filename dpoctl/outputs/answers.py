"""The answers of a server to a batch's requests, kept in FILE.answers until the batch's rows are written.

So a killed or stopped command repeats only the requests that were in flight. Each line is sealed; a damaged one is
asked for again. Standard library only.
"""

import json
import threading
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from .files import is_intact, json_line, seal, write_atomic, writing

_HEADER = "server"  # the key of the first line


class Answers:
    """Answers by the key of their request; thread-safe. `server` describes the server that gave them.

    `path` is the file, made with the first answer, or None to keep nothing. With `resuming` what the file holds is
    read; else it is removed.
    """

    def __init__(self, path: Path | None, resuming: bool):
        self.path = path
        self.server: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, Any]] = {}
        self._file: FileIO | None = None
        self._start = 0  # where the answers begin, after the header
        if path is not None and resuming:
            self._read(path)
        elif path is not None:
            path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._known)

    def known(self, key: str) -> dict[str, Any] | None:
        """The answer that was kept for a request."""
        return self._known.get(key)

    def keep(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer. Raises StorageError where the file cannot be written."""
        if self.path is None:
            return
        with self._lock:
            self._known[key] = answer
            # Not flushed to the disk: after a power cut an answer that is lost is asked for again.
            line = _line(key, answer)
            with writing(self.path, len(line)):
                if self._file is None:
                    self._open(self.path)
                assert self._file is not None
                _write(self._file, line)

    def forget(self) -> None:
        """Drop all answers: the rows of their batch are written, or they are not to be trusted."""
        with self._lock:
            self._known = {}
            if self.path is not None and self._file is not None:
                with writing(self.path):
                    self._file.truncate(self._start)
            elif self.path is not None:
                self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path) -> None:
        """Read the intact lines; where others were found, rewrite the file without them."""
        lines, damaged = [], False
        with suppress(OSError):
            for line in path.read_bytes().splitlines(keepends=True):
                entry = _entry(line)
                if entry is None:
                    damaged = True
                    continue
                lines.append(line)
                if entry["key"] == _HEADER:
                    self.server, self._start = entry["answer"], len(line)
                else:
                    self._known[entry["key"]] = entry["answer"]
        if self._known and self.server is None:  # whose answers these are is not known
            self._known, lines, damaged = {}, [], True
        if damaged:
            write_atomic(path, b"".join(lines))

    def _open(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)
        if path.stat().st_size == 0:
            header = _line(_HEADER, self.server or {})
            _write(self._file, header)
            self._start = len(header)


def _line(key: str, answer: dict[str, Any]) -> bytes:
    return json_line(seal({"key": key, "answer": answer})).encode()


def _write(file: FileIO, line: bytes) -> None:
    """Append a whole line. A disk that fills up takes a part of it, which is damaged then, and refuses the rest."""
    while line:
        line = line[file.write(line) :]


def _entry(line: bytes) -> dict[str, Any] | None:
    """What an intact line holds, else None."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    known = isinstance(entry, dict) and isinstance(entry.get("key"), str) and isinstance(entry.get("answer"), dict)
    return entry if known and line.endswith(b"\n") and "id" in entry and is_intact(entry) else None
