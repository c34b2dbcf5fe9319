"""A judge on a chat-completions server: retries, a cache by the complete request, token counts, and a cost limit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.judging import Judge
from ..errors import InputError
from ..outputs.files import cache_home, is_intact, seal, write_atomic

if TYPE_CHECKING:
    from openai import APIError
    from openai.types.chat import ChatCompletion

_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_RETRY_AFTER_S = 0.5, 30.0, 60.0
_TRANSIENT = (408, 409, 425, 429)  # and every status from 500 on
_COUNTS = ("asked", "from_cache", "retries", "prompt_tokens", "completion_tokens")
_SHORTEST_SECRET = 8  # a shorter key, such as EMPTY for a local server, is no secret


class Pending(Exception):
    """The request failed for a transient reason, as often as it was tried: it can be made again later."""


class CostReached(Exception):
    """The next request might exceed --max-cost."""


@dataclass(frozen=True)
class Answer:
    """What the judge wrote, and the tokens that the server counted for it."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Client:
    """`known(request)` reads the cache, `ask(request)` the server; both are thread-safe.

    The key comes from OPENAI_API_KEY; no file and no message contains it. `counts`: answers from the server and from
    the cache, retries, tokens. They start from `state`, the counts of an earlier call of the command, so that `dollars`
    is what all answers of the output cost, each counted once.
    """

    def __init__(self, config: Judge, state: dict[str, int] | None = None):
        try:
            import openai
        except ImportError:
            hint = "pip install 'dpoctl[judge]'"
            raise InputError("--backend openai: the package openai is not installed", hint) from None
        key = os.environ.get("OPENAI_API_KEY", "")
        if not key and not config.base_url:
            raise InputError("OPENAI_API_KEY is not set", hint="or give --base-url of a server that needs no key")
        self.config, self.openai, self.key = config, openai, key
        self.client = openai.OpenAI(
            api_key=key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0
        )
        self.folder = Path(config.cache_dir) if config.cache_dir else cache_home() / "judge"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"--cache-dir {self.folder}: is a file; a directory is needed") from None
        self.lock = threading.Lock()
        self.counts: dict[str, int] = dict.fromkeys(_COUNTS, 0) | (state or {})
        self.priced = config.price_in is not None
        self.in_flight, self.dearest = 0, self.dollars / max(1, self.answers)
        self.stopped = threading.Event()

    @property
    def dollars(self) -> float:
        return self._price(self.counts["prompt_tokens"], self.counts["completion_tokens"])

    @property
    def answers(self) -> int:
        return self.counts["asked"] + self.counts["from_cache"]

    def known(self, request: str) -> Answer | None:
        """The cached answer to a request that was made before."""
        answer = _read(self._path(self._body(request)))
        if answer is not None:
            self._count(answer, "from_cache")
        return answer

    def ask(self, request: str) -> Answer:
        """The server's answer to one request; it is cached.

        Raises Pending, CostReached, and InputError for what no retry can fix (key, model, request). After InputError
        and CostReached no further request is sent.
        """
        if self.stopped.is_set():
            raise Pending("stopped")
        body = self._body(request)
        path = self._path(body)
        try:
            with self._within_cost():
                answer = self._fetch(body)
                path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process has just cached the same answer
                    write_atomic(path, json.dumps(seal(vars(answer))))
                self._count(answer, "asked")
        except (InputError, CostReached):
            self.stopped.set()
            raise
        return answer

    def _body(self, request: str) -> dict[str, Any]:
        limit = "max_tokens" if self.config.base_url else "max_completion_tokens"
        temperature = self.config.judge_temperature
        if temperature is None and self.config.base_url:
            temperature = 0.0
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": request}],
            limit: self.config.max_tokens,
        } | ({} if temperature is None else {"temperature": temperature})

    def _path(self, body: dict[str, Any]) -> Path:
        key = json.dumps({"server": self.config.base_url or "openai", **body}, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def _fetch(self, body: dict[str, Any]) -> Answer:
        """The server's answer, with retries and exponential backoff. Raises Pending and InputError as ask does."""
        reason = ""
        for attempt in range(self.config.retries + 1):
            if attempt and self.stopped.is_set():
                break
            try:
                return self._answer(self.client.chat.completions.create(**body))
            except Exception as e:
                reason, retry_after = self._transient(e)
            if attempt < self.config.retries:
                with self.lock:
                    self.counts["retries"] += 1
                backoff = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * (0.5 + random.random() / 2)
                self.stopped.wait(max(retry_after, backoff))
        raise Pending(reason)

    def _transient(self, error: Exception) -> tuple[str, float]:
        """(reason, seconds that the server asks to wait) of a transient failure; raises for every other."""
        openai = self.openai
        if isinstance(error, openai.APIStatusError):
            status = f"{error.status_code} ({self._short(error)})"
            if error.status_code not in _TRANSIENT and error.status_code < 500:
                hint = "401: OPENAI_API_KEY; 404 and 400: --model, --base-url"
                raise InputError(f"the judge's server refuses the request: {status}", hint) from None
            return f"status {status}", _retry_after(error.response.headers)
        if isinstance(error, openai.APITimeoutError | openai.APIConnectionError):
            return type(error).__name__, 0.0
        malformed = (openai.APIError, ValueError, TypeError, AttributeError, KeyError, IndexError)
        if isinstance(error, malformed):  # not JSON, or without the fields of a completion
            return f"a malformed response ({type(error).__name__})", 0.0
        raise error

    def _answer(self, response: ChatCompletion) -> Answer:
        """Raises TypeError and the like for a malformed response.

        A response without text, such as a refusal or reasoning alone, is valid: an answer without a verdict.
        """
        message, usage = response.choices[0].message, response.usage
        text = message.content or getattr(message, "refusal", None) or ""
        if not isinstance(text, str):
            raise TypeError("no text")
        prompt_tokens, completion_tokens = (
            getattr(usage, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens")
        )
        if self.config.max_cost is not None and not prompt_tokens and not completion_tokens:
            raise InputError("--max-cost: the judge's server counts no tokens", hint="leave --max-cost out")
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to a file
        return Answer(self._without_key(text), prompt_tokens, completion_tokens)

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

    def _short(self, error: APIError) -> str:
        lines = str(error.message).strip().splitlines()
        return self._without_key(lines[0])[:160] if lines else type(error).__name__

    def _without_key(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return text.replace(self.key, "[the key]") if len(self.key) >= _SHORTEST_SECRET else text


def _read(path: Path) -> Answer | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Answer(**{k: v for k, v in known.items() if k != "id"}) if is_intact(known) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, as a number or a date; at most a minute, 0 where it asks nothing."""
    value = headers.get("retry-after") or ""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(_LONGEST_RETRY_AFTER_S, seconds) if seconds > 0 else 0.0
