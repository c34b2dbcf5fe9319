"""What is known of batches in flight, in the folder of the judge's cache: one sealed file for each.

A record is written before its batch is submitted and again when the server has named it, so that a command that is
killed at any point finds the batch, and asks for none of its requests again. It is removed when the answers are cached.
"""

import json
import os
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import log
from ..errors import InputError, OutputInUse
from ..outputs.files import is_intact, seal, write_atomic
from ..outputs.locks import lock
from ..runtime import signals

_EVERY_S = 0.2


@dataclass(frozen=True)
class Record:
    """A batch: its input file on the server, and the batch's id there, empty until the server has given it.

    `name`: drawn for this batch, and part of its metadata on the server. `digests`: its requests. `tokens`: about the
    most prompt tokens of all of them. `answer_tokens`: the longest answer that they ask for.
    """

    name: str
    server: str
    file_id: str
    digests: list[str]
    tokens: int
    answer_tokens: int
    created: float
    batch_id: str = ""

    def named(self, batch_id: str) -> "Record":
        """The record with the id that the server gave."""
        return replace(self, batch_id=batch_id)


class Records:
    """The records of one server's batches; other commands may write into the folder at the same time."""

    def __init__(self, cache: Path, server: str):
        self.folder, self.server = cache / "batches", server

    def all(self) -> list[Record]:
        """The batches that are in flight, oldest first. Raises InputError for a damaged record."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with suppress(FileNotFoundError):  # collected by another process
                found.append(_read(path))
        return sorted((r for r in found if r.server == self.server), key=lambda r: (r.created, r.name))

    def by_digest(self) -> dict[str, Record]:
        """The batch in flight of each request."""
        return {digest: record for record in self.all() for digest in record.digests}

    def path(self, record: Record) -> Path:
        """Where a record is."""
        return self.folder / f"{record.name}.json"

    def new(self, file_id: str, digests: Collection[str], tokens: int, answer_tokens: int) -> Record:
        """Write the record of a batch that is about to be submitted."""
        name = secrets.token_hex(8)
        record = Record(name, self.server, file_id, list(digests), tokens, answer_tokens, time.time())
        self.write(record)
        return record

    def write(self, record: Record) -> None:
        """Write a record, complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path(record), json.dumps(seal(asdict(record))))

    def remove(self, record: Record) -> None:
        """Remove the record of a batch whose results are kept."""
        self.path(record).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process submit batches meanwhile. Raises Interrupted where a signal arrives while waiting."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            said = False
            while True:
                try:
                    lock(fd, str(path), "cache folder")
                    break
                except OutputInUse:
                    if not said:
                        log.say(f"{self.folder}: another dpoctl process submits batches; waiting for it")
                        said = True
                    signals.at_boundary("nothing: another process submits batches")
                    time.sleep(_EVERY_S)
            yield
        finally:
            os.close(fd)


def _read(path: Path) -> Record:
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not ("id" in held and is_intact(held)):
            raise ValueError
        return Record(**{name: value for name, value in held.items() if name != "id"})
    except (ValueError, TypeError, AttributeError):
        hint = "remove it if no batch of the judge is in flight; answers of one that is would be paid for again"
        raise InputError(f"{path}: damaged, so that a batch in flight is not known", hint) from None
