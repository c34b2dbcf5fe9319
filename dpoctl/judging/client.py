"""A judge on a chat-completions server: retries, a cache by the complete request, token counts, and a cost limit."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config.judge_options import JudgeOptions
from ..errors import InputError
from ..runtime.http import backoff_s
from ..runtime.server_errors import CONTENT, FATAL, TRANSIENT, ServerError
from .connection import Connection, Failure, server_of
from .parameters import as_call
from .replies import Answer, Refusal, Reply, read_answer
from .requests import Requests

_MOST_IN_A_ROW = 32  # refusals without a stated reason: something else has changed than the content


class Pending(Exception):
    """The request failed for a transient reason, as often as it was tried: it can be made again later."""


class CostReached(Exception):
    """The next request might exceed --max-cost."""


class Client(Requests):
    """`known(request)` reads the cache, `ask(request)` asks the server; both are thread-safe."""

    def __init__(self, config: JudgeOptions, state: dict[str, Any] | None = None):
        """Raises InputError as Connection and Requests do."""
        self.connection = Connection(config)
        super().__init__(config, state, server_of(config))
        self.refused_in_a_row = 0
        self.in_flight = 0
        self.stopped = threading.Event()

    def ask(self, request: str) -> Reply:
        """The server's reply to one request; an answer is cached, a refusal is not.

        Raises Pending, CostReached, and InputError for what no retry can fix (key, model, address). After InputError
        and CostReached no further request is sent.
        """
        if self.stopped.is_set():
            raise Pending("stopped")
        try:
            with self._within_cost():
                reply = self._fetch(request)
            self._watch(reply)
        except (InputError, CostReached):
            self.stopped.set()
            raise
        return reply

    def _fetch(self, request: str) -> Reply:
        """The server's reply, with retries and exponential backoff. Raises Pending and InputError as ask does."""
        attempt = 0
        while True:
            parameters = self.parameters
            if (
                parameters.learnt and (answer := self.known(request)) is not None
            ):  # looked up with the first ones so far
                return answer
            outcome = self._attempt(self.body(request, parameters))
            if isinstance(outcome, Answer):
                return outcome
            error = outcome.error
            if error and self.learn(parameters, error):
                continue
            if error and error.kind != TRANSIENT:
                if error.kind == FATAL:
                    raise self.refuse(error)
                return Refusal(error, certain=error.kind == CONTENT)
            if attempt == self.config.judge_retries:
                if outcome.without_choice:
                    return Refusal(ServerError(200, outcome.reason), certain=False)
                raise Pending(outcome.reason)
            self._wait(attempt, outcome.wait_s)
            if self.stopped.is_set():
                raise Pending(outcome.reason)
            attempt += 1

    def _wait(self, attempt: int, asked_s: float) -> None:
        with self.lock:
            self.counts["retries"] += 1
        self.stopped.wait(max(asked_s, backoff_s(attempt)))

    def _attempt(self, body: dict[str, Any]) -> Answer | Failure:
        """One request. An answer is counted and cached. Raises InputError where --max-cost cannot be held."""
        completions = self.connection.client.chat.completions
        answer = self.connection.attempt(
            lambda: read_answer(completions.with_raw_response.create(**as_call(body)).text)
        )
        if not isinstance(answer, Answer):
            return answer
        answer = answer.changed(self.connection.without_key)
        counted = answer.prompt_tokens or answer.completion_tokens
        if self.config.max_cost is not None and not counted and not answer.reason:
            raise InputError("--max-cost: the judge's server counts no tokens", hint="leave --max-cost out")
        self.cache.write(self.digest(body), answer)
        self.count(answer, "asked")
        return answer

    def _watch(self, reply: Reply) -> None:
        """Notice the first answer, and a server that has begun to refuse everything."""
        with self.lock:
            if isinstance(reply, Answer):
                self.accepted, self.refused_in_a_row = True, 0
            elif not reply.certain:
                self.refused_in_a_row += 1
                if self.refused_in_a_row > _MOST_IN_A_ROW:
                    raise self.refuse(
                        reply.error, f"; so it did with {_MOST_IN_A_ROW} others before, one after another"
                    )

    @contextmanager
    def _within_cost(self) -> Iterator[None]:
        """Reserve one more request under --max-cost; each in flight may cost as much as the dearest answer did."""
        with self.lock:
            limit, at_most = self.config.max_cost, self.dollars + (self.in_flight + 1) * self.dearest
            if limit is not None and (at_most > limit * (1 + 1e-9) or self.dollars >= limit):
                raise CostReached
            self.in_flight += 1
        try:
            yield
        finally:
            with self.lock:
                self.in_flight -= 1
