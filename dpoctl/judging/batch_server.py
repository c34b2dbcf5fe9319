"""The files and batches of a server with OpenAI's batch API: upload, submit, look, download.

What may pass is retried. Whether a batch was created is never guessed: where the response is lost, the server's list of
batches tells.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from .. import log
from ..config.judge_options import JudgeOptions
from ..config.schema import flag_named
from ..errors import InputError
from ..runtime import signals
from ..runtime.http import backoff_s
from ..runtime.server_errors import FATAL, TRANSIENT, ServerError, read_error
from .batch_files import ENDPOINT
from .batch_records import Record
from .client import Pending
from .connection import Connection, Failure
from .requests import Requests

_WINDOW: Final = "24h"  # the only one that there is
_METADATA = "dpoctl"  # under which a batch has the name of its record
_FILE_TIMEOUT_S = 600.0  # of 200 MB
_PAGE, _MOST_PAGES = 100, 1000
_POLL_S = 0.2  # how often signals are looked for
_ENDED = ("completed", "failed", "expired", "cancelled")


class Refused(Exception):
    """The server refuses a batch: it is not created, or has failed before any of its requests was answered."""

    def __init__(self, error: ServerError):
        super().__init__(str(error))
        self.error = error

    @property
    def queue_is_full(self) -> bool:
        """Whether it is refused until others have ended, or in any case for its size."""
        said = f"{self.error.code} {self.error.message}".lower()
        return "token_limit" in said or "enqueued" in said or "batch_limit" in said


class Batch(NamedTuple):
    """A batch as the server describes it. `answered` and `failed` are counts of requests, None where it gives none."""

    status: str
    files: tuple[str, ...]  # of answers, and of errors
    answered: int | None
    failed: int | None
    error: ServerError | None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


class BatchServer:
    """Raises Pending where the server is busy or away, InputError where it refuses whatever it is asked."""

    def __init__(self, config: JudgeOptions, requests: Requests):
        """Raises InputError as Connection does."""
        self.config, self.requests = config, requests
        self.connection = Connection(config)
        self.files = self.connection.client.with_options(timeout=_FILE_TIMEOUT_S).files.with_raw_response
        self.batches = self.connection.client.batches.with_raw_response

    def upload(self, content: bytes) -> str:
        """The id of a new file with requests. Twice, where a response is lost: a file costs nothing."""

        def send() -> str:
            sent = self.files.create(file=("dpoctl-judge.jsonl", content), purpose="batch")
            return _id_in(sent.text)

        try:
            return self._retried(send, _FILE_TIMEOUT_S)
        except Refused as e:
            raise self._refusal(e.error, "to upload a batch file") from None

    def create(self, record: Record, *, again: bool = False) -> str:
        """The id of the batch of a record, which is submitted once; `again`: it may have been already.

        Raises Refused where the server does not take it.
        """

        def send() -> str:
            nonlocal again
            if again and (found := self.find(record)):
                return found
            again = True  # from now on a lost response leaves it open
            sent = self.batches.create(
                input_file_id=record.file_id,
                endpoint=ENDPOINT,
                completion_window=_WINDOW,
                metadata={_METADATA: record.name},
            )
            return _id_in(sent.text)

        return self._retried(send)

    def find(self, record: Record) -> str:
        """The id of the batch that was submitted for a record; empty where there is none.

        Raises InputError where the server does not list its batches.
        """
        after: str | None = None
        for _ in range(_MOST_PAGES):
            page = self._page(after)
            for entry in page:
                name = (entry.get("metadata") or {}).get(_METADATA)
                if name == record.name or (name is None and entry.get("input_file_id") == record.file_id):
                    return str(entry["id"])
            if not page or page[-1]["id"] == after:  # some servers send all of them, whatever they are asked
                break
            after = page[-1]["id"]
        return ""

    def look(self, batch_id: str) -> Batch:
        """A batch as it is now. Raises InputError for one that the server does not know."""
        try:
            found = self._retried(lambda: _batch_in(self.batches.retrieve(batch_id).text))
        except Refused as e:
            if e.error.status != 404:
                raise self._refusal(e.error, f"to tell of batch {batch_id}") from None
            raise InputError(
                f"the judge's server does not know batch {batch_id}, which was submitted: {e.error}",
                hint="OPENAI_API_KEY must be of the same project as then",
            ) from None
        return found

    def download(self, file_id: str) -> str:
        """The text of a file."""
        try:
            return self._retried(
                lambda: self.files.content(file_id).content.decode("utf-8", "replace"), _FILE_TIMEOUT_S
            )
        except Refused as e:
            if e.error.status == 404:  # not yet there, or removed: the batch is looked at again
                raise Pending(f"status {e.error}") from None
            raise self._refusal(e.error, f"to send file {file_id}") from None

    def wait(self, seconds: float, done: str) -> None:
        """Wait. Raises Interrupted with what is `done` where a signal arrives."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            signals.at_boundary(done)
            time.sleep(min(left, _POLL_S))
        signals.at_boundary(done)

    def _page(self, after: str | None) -> list[dict[str, Any]]:
        """Some of the server's batches, newest first. Raises InputError, for which nothing is submitted again."""

        def read() -> list[dict[str, Any]]:
            sent = self.batches.list(limit=_PAGE, after=after) if after else self.batches.list(limit=_PAGE)
            return [entry for entry in json.loads(sent.text)["data"] if isinstance(entry["id"], str)]

        try:
            return self._retried(read)
        except Refused as e:
            raise InputError(
                f"whether a batch was submitted before the command stopped is not known: the server lists none: "
                f"{e.error}",
                hint=f"look at the server, then remove {self.requests.cache.folder / 'batches'} to submit it again",
            ) from None

    def _retried(self, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """What `call` returns. Raises Refused for an error that no retry can mend, Pending after the last retry."""
        attempt = 0
        while True:
            found = self.connection.attempt(call, timeout_s)
            if not isinstance(found, Failure):
                return found
            if found.error and (found.error.kind != TRANSIENT or Refused(found.error).queue_is_full):
                raise Refused(found.error)
            if attempt == self.config.judge_retries:
                raise Pending(found.reason)
            log.detail(f"the judge's server: {found.reason}; retrying")
            self.requests.counts["retries"] += 1
            self.wait(max(found.wait_s, backoff_s(attempt)), "the steps before, which are recorded")
            attempt += 1

    def _refusal(self, error: ServerError, what: str) -> InputError:
        if error.status in (404, 405, 501) and error.kind == FATAL:
            batch, url = (flag_named(self.config, name) for name in ("judge_batch", "judge_base_url"))
            files = flag_named(self.config, "judge_batch_files")
            return InputError(
                f"the judge's server refuses {what}: {error}",
                hint=f"has it batches? {url} names another server; without {batch} requests are single calls; {files} "
                "writes them for vllm run-batch",
            )
        return self.requests.refuse(error)


def _id_in(text: str) -> str:
    """Raises ValueError and the like for a response without an id."""
    found = json.loads(text)["id"]
    if not (isinstance(found, str) and found):
        raise ValueError("no id")
    return found


def _batch_in(text: str) -> Batch:
    """Raises ValueError and the like for what is no batch."""
    data: Mapping[str, Any] = json.loads(text)
    files = tuple(data[name] for name in ("output_file_id", "error_file_id") if data.get(name))
    counts = data.get("request_counts") or {}
    said = (data.get("errors") or {}).get("data") or []
    error = read_error(400, said[0] if isinstance(said[0], dict) else str(said[0])) if said else None
    return Batch(str(data["status"]).lower(), files, counts.get("completed"), counts.get("failed"), error)
