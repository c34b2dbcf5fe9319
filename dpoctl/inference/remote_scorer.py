"""A scorer behind an address, as reward servers are: rows out, numbers back (the protocol is on the page on options).

POST {"rows": [{"prompt": ..., "completion": ...}, ...]} is answered by {"scores": [..., ...]}, a number for each row in
order. A prompt that is a chat is a list of messages.
"""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ..errors import InputError, Interrupted
from ..runtime.http import Http, NoResponse, Response, as_completed, backoff_s, retry_after_s, without_key
from ..runtime.server_errors import TRANSIENT, error_in
from .scorer_text import completion_of, describe

_ROWS = 32  # of a request
_CONCURRENCY = 8
_TIMEOUT_S = 300.0
_RETRIES = 6
KEY = "DPOCTL_SCORER_API_KEY"


class _Transient(Exception):
    """A failed attempt that may succeed later; `wait_s` is what the server asks to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


class RemoteScores:
    """Scores of a server, with retries. `answered`: it has given scores before, in this process."""

    def __init__(self, url: str):
        """Raises InputError for a malformed address."""
        self.url = url
        self.http = Http(url, _TIMEOUT_S, os.environ.get(KEY, ""), timeout_flag="")
        self.path = "/" if url.endswith("/") else ""  # which Http takes off
        self.answered = False
        self.stopped = threading.Event()

    def of(self, rows: Sequence[dict]) -> list[float]:
        """A number for each row, some requests in flight at a time.

        Raises InputError for an answer that is no list of numbers, one a row, for a request that the server refuses,
        and where it has never answered; Interrupted where it stops answering, and on a signal.
        """
        self.stopped.clear()
        parts = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
        try:
            with ThreadPoolExecutor(_CONCURRENCY) as pool:
                futures = [pool.submit(self._ask, part) for part in parts]
                try:
                    for future in as_completed(futures, "the last complete batch"):
                        future.result()
                except BaseException:
                    self.stopped.set()
                    self.http.abort()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            self.http.close()  # the connections of threads that have ended
        return [score for future in futures for score in future.result()]

    def _ask(self, rows: Sequence[dict]) -> list[float]:
        body = {"rows": [{"prompt": row.get("prompt", ""), "completion": completion_of(row)} for row in rows]}
        attempt = 0
        while True:
            try:
                scores = self._scores(self.http.post(self.path, body), rows)
            except (_Transient, NoResponse) as e:
                wait_s = max(backoff_s(attempt), getattr(e, "wait_s", 0.0))
                if attempt == _RETRIES or self.stopped.wait(wait_s):  # stopped: nothing more is sent
                    raise self._gone(str(e)) from None
                attempt += 1
            else:
                self.answered = True
                return scores

    def _scores(self, response: Response, rows: Sequence[dict]) -> list[float]:
        if response.status != 200:
            error = error_in(response.status, response.text, self.http.key)
            if error.kind == TRANSIENT:
                raise _Transient(f"status {error}", retry_after_s(response.headers))
            hint = f"check the address; a key comes from {KEY}" if error.status in (401, 403, 404, 405) else ""
            raise InputError(f"{self.url}: the scorer's server refuses the request: {error}", hint)
        scores = None
        with suppress(ValueError, AttributeError):  # not JSON, or no object
            scores = json.loads(response.text).get("scores")
        if not isinstance(scores, list):
            shown = without_key(response.text[:80], self.http.key)
            raise InputError(
                f"{self.url}: expected an object with a list 'scores', got {shown!r}",
                hint="dpoctl docs options describes what a scorer's server answers",
            )
        if len(scores) != len(rows):
            raise InputError(
                f"{self.url}: the scorer's server returned {len(scores)} scores for {len(rows)} rows, the first of "
                f"them {describe(rows[0])}",
                hint="return one number for each row, in order",
            )
        for row, score in zip(rows, scores, strict=True):
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise InputError(f"{self.url}: expected a number, got {score!r:.40} for {describe(row)}")
        return [float(score) for score in scores]

    def _gone(self, reason: str) -> InputError | Interrupted:
        if self.answered:
            message = f"{self.url}: the scorer's server does not answer any more: {reason}"
            return Interrupted(message, hint="rerun the command to resume when it is up again")
        message = f"{self.url}: the scorer's server does not answer: {reason}"
        return InputError(message, hint="start the server, or check the address")
