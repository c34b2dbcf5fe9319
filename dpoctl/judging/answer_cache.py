"""Answers of judges in a folder, one file each, found by a digest of the complete request."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config.judge_options import JudgeOptions
from ..config.schema import flag_named
from ..errors import InputError
from ..outputs.files import cache_home, is_intact, seal, write_atomic
from .replies import Answer


def digest_of(request: Mapping[str, Any]) -> str:
    """SHA-256 in hex of a complete request: all that the answer may depend on."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """The answers in `folder`, which several commands may share. Raises InputError where it is a file."""

    def __init__(self, config: JudgeOptions):
        self.folder = Path(config.judge_cache_dir) if config.judge_cache_dir else cache_home() / "judge"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            flag = flag_named(config, "judge_cache_dir")
            raise InputError(f"{flag} {self.folder}: is a file; a directory is needed") from None

    def read(self, digest: str) -> Answer | None:
        """The answer to a request; None where there is none, or a damaged one."""
        try:
            known = json.loads(self._path(digest).read_text(encoding="utf-8"))
            return Answer(**{k: v for k, v in known.items() if k != "id"}) if is_intact(known) else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, digest: str, answer: Answer) -> None:
        """Keep an answer. Raises StorageError where it cannot be written."""
        path = self._path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has just cached the same answer
            write_atomic(path, json.dumps(seal(answer.stored())))

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.json"
