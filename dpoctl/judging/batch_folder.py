"""A judge that is asked by batch files in a folder, which another program answers: `vllm run-batch` on a cluster.

requests-0001.jsonl is written here, answers-0001.jsonl is what the other program makes of it.
"""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .. import log
from ..config.judge_options import JudgeOptions
from ..config.schema import flag_named
from ..errors import InputError, Interrupted
from ..outputs.claims import Output
from ..outputs.files import write_atomic
from ..runtime.server_errors import ServerError
from .batch_files import MOST_REQUESTS, Result, parts, read_results
from .batched import BatchedRequests

_NAME = re.compile(r"requests-(\d{4,})\.jsonl")
SERVER = "batch files"  # in the keys of the cache


class _Asked(NamedTuple):
    """A file of requests, and where its answers belong."""

    number: int
    requests: Path
    answers: Path

    def digests(self) -> set[str]:
        """Raises InputError for a damaged file."""
        try:
            lines = self.requests.read_text(encoding="utf-8").splitlines()
            return {json.loads(line)["custom_id"] for line in lines if line.strip()}
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{self.requests}: damaged", "remove it; its requests are written again") from None


class FileClient(BatchedRequests):
    """Replies by the answers in a folder."""

    def __init__(self, config: JudgeOptions, state: dict[str, Any], output: Output):
        """Raises InputError where the folder is a file, and as Requests does."""
        super().__init__(config, state, output, SERVER)
        self.folder = Path(str(config.judge_batch_files))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            flag = flag_named(config, "judge_batch_files")
            raise InputError(f"{flag} {self.folder}: is a file; a directory is needed") from None

    def fetch(self, requests: Iterable[str]) -> None:
        """Read what is answered, and write what is to be asked. Raises Interrupted where that is something.

        Raises InputError where all requests are refused for the same cause, and for damaged files.
        """
        asked = list(dict.fromkeys(requests))
        self._known.clear()
        waiting = self._waiting(asked)
        lines = self.missing(asked)
        new = {digest: line for digest, line in lines.items() if digest not in waiting}
        left = {waiting[digest] for digest in lines if digest in waiting} | set(self._write(new))
        if left:
            raise self._pending(len(lines), sorted(left))

    def _waiting(self, asked: list[str]) -> dict[str, _Asked]:
        """Read the answers that are there; the files of the requests that have none yet, by digest."""
        while True:
            parameters, lines = self.parameters, self.missing(asked)
            waiting: dict[str, _Asked] = {}
            for file in self._files() if lines else ():
                digests = file.digests()
                if not digests & lines.keys():
                    continue
                if not file.answers.exists() or not self._is_read(file, digests, lines.keys()):
                    waiting |= dict.fromkeys(digests, file)
            if self.parameters is parameters:  # else other requests are wanted, which may be answered too
                return waiting

    def _files(self) -> list[_Asked]:
        """The files of requests in the folder, in order."""
        numbers = sorted(int(m[1]) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name)))
        return [self._file(number) for number in numbers]

    def _file(self, number: int) -> _Asked:
        names = (f"{kind}-{number:04d}.jsonl" for kind in ("requests", "answers"))
        return _Asked(number, *(self.folder / name for name in names))

    def _is_read(self, file: _Asked, digests: set[str], wanted: Iterable[str]) -> bool:
        """Keep the answers of a file; whether it is complete.

        Raises InputError where none of its requests was answered and all were refused for a cause that a rerun cannot
        mend, such as the name of the model.
        """
        found, damaged = read_results(file.answers.read_text(encoding="utf-8", errors="replace"))
        found = {digest: result for digest, result in found.items() if digest in digests}
        fatal = self.receive(found, set(wanted) & digests)
        if fatal:
            raise self._no_answers(file, found, fatal)
        if damaged:
            log.warn(f"{file.answers}: {damaged} damaged lines: is it still being written? Its other answers are read")
        return not damaged and bool(found)

    def _no_answers(self, file: _Asked, found: dict[str, Result], error: ServerError) -> InputError:
        refused = sum(result.answer is None for result in found.values())
        return InputError(
            f"{file.answers}: {refused} of {len(found)} requests are refused: {error}",
            hint=f"answer {file.requests} again with the model {self.config.judge_model}; its name is in the requests",
        )

    def _write(self, lines: dict[str, str]) -> list[_Asked]:
        """Write requests as new files."""
        files = self._files()
        written = []
        for part in parts(lines, MOST_REQUESTS):
            number = files[-1].number + 1 if files else 1
            files.append(self._file(number))
            write_atomic(files[-1].requests, "".join(part.values()))
            written.append(files[-1])
        return written

    def _pending(self, requests: int, files: list[_Asked]) -> Interrupted:
        """What is to be run. The command ends: its answers come from elsewhere."""
        model = shlex.quote(str(self.config.judge_model))
        for file in files:
            paths = " -o ".join(shlex.quote(str(path)) for path in (file.requests, file.answers))
            log.say(f"to run: vllm run-batch -i {paths} --model {model}")
        names = ", ".join(file.requests.name for file in files)
        return Interrupted(
            f"{requests} requests wait for answers: {self.folder}: {names}",
            hint="run vllm run-batch as above, then rerun the command to collect the answers",
        )
