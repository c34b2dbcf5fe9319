"""A judge on a chat-completions server: retries, a cache by the complete request, token counts, and a cost limit."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import log
from ..config.judge_options import JudgeOptions
from ..config.schema import flag_named
from ..errors import InputError
from ..outputs.files import cache_home, is_intact, seal, write_atomic
from ..runtime.http import backoff_s, retry_after_s, without_key
from ..runtime.server_errors import CONTENT, FATAL, TRANSIENT, ServerError, error_in
from .parameters import Parameters, as_call
from .replies import Answer, ErrorInside, NoChoice, Refusal, Reply, read_answer

if TYPE_CHECKING:
    from openai import APIStatusError

_COUNTS = ("asked", "from_cache", "retries", "prompt_tokens", "completion_tokens")
_MOST_IN_A_ROW = 32  # refusals without a stated reason: something else has changed than the content


class Pending(Exception):
    """The request failed for a transient reason, as often as it was tried: it can be made again later."""


class CostReached(Exception):
    """The next request might exceed --max-cost."""


@dataclass(frozen=True)
class _Failure:
    """A request without an answer: the server's `error`, or None where it sent nothing that can be read."""

    reason: str
    error: ServerError | None = None
    wait_s: float = 0.0  # what the server asks to wait
    without_choice: bool = False


class Client:
    """`known(request)` reads the cache, `ask(request)` the server; both are thread-safe.

    The key comes from OPENAI_API_KEY; no file and no message contains it. `counts`: answers from the server and from
    the cache, retries, tokens. They start from `state`, that of an earlier call of the command, so that `dollars` is
    what all answers of the output cost, each counted once. `parameters` are those that the server takes: learnt from
    its errors until it has answered once, then fixed.
    """

    def __init__(self, config: JudgeOptions, state: dict[str, Any] | None = None):
        try:
            import openai
        except ImportError:
            hint = "pip install 'dpoctl[judge]'"
            raise InputError("a judge on a server: the package openai is not installed", hint) from None
        key = os.environ.get("OPENAI_API_KEY", "")
        if not key and not config.judge_base_url:
            flag = flag_named(config, "judge_base_url")
            raise InputError("OPENAI_API_KEY is not set", hint=f"or give {flag} of a server that needs no key")
        self.config, self.openai, self.key = config, openai, key
        self.client = openai.OpenAI(
            api_key=key or "none", base_url=config.judge_base_url, timeout=config.judge_timeout, max_retries=0
        )
        self.folder = Path(config.judge_cache_dir) if config.judge_cache_dir else cache_home() / "judge"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            flag = flag_named(config, "judge_cache_dir")
            raise InputError(f"{flag} {self.folder}: is a file; a directory is needed") from None
        self.lock = threading.Lock()
        before = state or {}
        self.counts: dict[str, int] = {name: before.get(name, 0) for name in _COUNTS}
        self.parameters = Parameters.first(config, before.get("parameters") or {})
        self.rows_written = bool(before)  # with these parameters
        self.accepted = False  # the server has answered with these parameters
        self.refused_in_a_row = 0
        self.priced = config.price_in is not None
        self.in_flight, self.dearest = 0, self.dollars / max(1, self.answers)
        self.stopped = threading.Event()

    @property
    def dollars(self) -> float:
        return self._price(self.counts["prompt_tokens"], self.counts["completion_tokens"])

    @property
    def answers(self) -> int:
        return self.counts["asked"] + self.counts["from_cache"]

    def state(self) -> dict[str, Any]:
        """What the client of a resumed command needs."""
        return dict(self.counts) | {"parameters": self.parameters.state()}

    def known(self, request: str) -> Answer | None:
        """The cached answer to a request that was made before."""
        answer = _read(self._path(self._body(request, self.parameters)))
        if answer is not None:
            self._count(answer, "from_cache")
        return answer

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

    def refuse(self, error: ServerError, more: str = "") -> InputError:
        """The error with which the command stops, since the server refuses every request."""
        model, url, most = (
            flag_named(self.config, name) for name in ("judge_model", "judge_base_url", "judge_max_tokens")
        )
        hint = f"401: OPENAI_API_KEY; 404 and 400: {model}, {url}, {most}"
        if error.kind == CONTENT:
            hint = f"the server's limits: {most} counts too; texts that are refused can be left out of the files"
        return InputError(f"the judge's server refuses the request: {error}{more}", hint)

    def _body(self, request: str, parameters: Parameters) -> dict[str, Any]:
        message = {"role": "user", "content": request + parameters.addition}
        return {"model": self.config.judge_model, "messages": [message]} | parameters.sent()

    def _path(self, body: dict[str, Any]) -> Path:
        key = json.dumps({"server": self.config.judge_base_url or "openai", **body}, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def _fetch(self, request: str) -> Reply:
        """The server's reply, with retries and exponential backoff. Raises Pending and InputError as ask does."""
        attempt = 0
        while True:
            parameters = self.parameters
            if (
                parameters.learnt and (answer := self.known(request)) is not None
            ):  # looked up with the first ones so far
                return answer
            outcome = self._attempt(self._body(request, parameters))
            if isinstance(outcome, Answer):
                return outcome
            error = outcome.error
            if error and self._learn(parameters, error):
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

    def _attempt(self, body: dict[str, Any]) -> Answer | _Failure:
        """One request. An answer is counted and cached. Raises InputError where --max-cost cannot be held."""
        openai = self.openai
        malformed = (openai.APIError, ValueError, TypeError, AttributeError, KeyError, IndexError)
        try:
            response = self.client.chat.completions.with_raw_response.create(**as_call(body))
            answer = read_answer(response.text)
        except ErrorInside as e:
            error = replace(e.error, message=self._without_key(e.error.message))
            return _Failure(f"an error in a response of status 200: {error}", error)
        except NoChoice as e:
            return _Failure(f"a response with {e}", without_choice=True)
        except openai.APIStatusError as e:
            error = self._error(e)
            return _Failure(f"status {error}", error, retry_after_s(e.response.headers))
        except openai.APITimeoutError:
            flag = flag_named(self.config, "judge_timeout")
            return _Failure(f"no response within {flag} {self.config.judge_timeout:g} s")
        except openai.APIConnectionError as e:
            return _Failure(f"{type(e).__name__} ({self._without_key(str(e.__cause__ or e))[:160]})")
        except malformed as e:  # not JSON, or without the fields of a completion
            return _Failure(f"a malformed response ({type(e).__name__}: {self._without_key(str(e))[:160]})")
        answer = answer.changed(self._without_key)
        counted = answer.prompt_tokens or answer.completion_tokens
        if self.config.max_cost is not None and not counted and not answer.reason:
            raise InputError("--max-cost: the judge's server counts no tokens", hint="leave --max-cost out")
        path = self._path(body)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has just cached the same answer
            write_atomic(path, json.dumps(seal(answer.stored())))
        self._count(answer, "asked")
        return answer

    def _error(self, error: APIStatusError) -> ServerError:
        return error_in(error.status_code, error.response.text, self.key, type(error).__name__)

    def _learn(self, parameters: Parameters, error: ServerError) -> bool:
        """Whether the request can be repeated with other parameters; a change is said once.

        Raises InputError where answers that are counted already were given with a parameter that is refused now.
        """
        with self.lock:
            if self.parameters is not parameters:  # another request has learnt it
                return True
            changed = None if self.accepted else parameters.without(error)
            if changed is None:
                return False
            lost = [name for name, _ in parameters.values if name not in dict(changed.values)]
            if lost and self.rows_written:
                raise InputError(
                    f"the judge's server refuses {lost[0]}, with which {self.answers} answers were given: {error}",
                    hint=f"use --overwrite, and another {flag_named(self.config, 'judge_cache_dir')}, to judge all "
                    "comparisons without it",
                )
            self.parameters = changed
        if changed.limit != parameters.limit:
            log.warn(f"the judge's server takes {changed.limit} in place of {parameters.limit}: {error}")
        for name in lost:
            log.warn(f"the judge's server refuses {parameters.told_without(name)}: {error}")
        return True

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

    def _count(self, answer: Answer, source: str) -> None:
        with self.lock:
            self.counts[source] += 1
            self.counts["prompt_tokens"] += answer.prompt_tokens
            self.counts["completion_tokens"] += answer.completion_tokens
            self.dearest = max(self.dearest, self._price(answer.prompt_tokens, answer.completion_tokens))

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars."""
        return (prompt_tokens * (self.config.price_in or 0) + completion_tokens * (self.config.price_out or 0)) / 1e6

    def _without_key(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return without_key(text, self.key)


def _read(path: Path) -> Answer | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Answer(**{k: v for k, v in known.items() if k != "id"}) if is_intact(known) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
