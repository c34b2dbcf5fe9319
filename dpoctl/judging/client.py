"""A judge behind a chat-completions server: retried, cached by the whole request, counted, and stopped at a cost."""

import hashlib
import json
import os
import random
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from ..errors import InputError
from ..outputs.files import is_whole, seal, write_atomic

_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_S = 0.5, 30.0, 60.0
_PASSING = (408, 409, 425, 429)  # and everything from 500 on


class Pending(Exception):
    """The request failed for a passing reason, as often as it was tried: it can be made again later."""


class CostReached(Exception):
    """The next request might go past --max-cost."""


@dataclass(frozen=True)
class Answer:
    """What the judge wrote, and the tokens that were counted for it."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Client:
    """`ask(request)` from any number of threads. The key comes from OPENAI_API_KEY and goes nowhere else.

    `counts`: answers asked anew and from the cache, retries, tokens; they begin where `state` (of an earlier call of the
    command) ended, so that `dollars` is what all answers of the work cost, each once.
    """

    def __init__(self, config, state: dict | None = None):
        try:
            import openai
        except ImportError:
            raise InputError(
                "--backend openai: the package is not installed", hint="pip install 'dpoctl[judge]'"
            ) from None
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not config.base_url:
            raise InputError("no key: OPENAI_API_KEY is not set", hint="or --base-url of a server that needs none")
        self.config, self.openai, self.key = config, openai, key
        self.client = openai.OpenAI(
            api_key=key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0
        )
        self.folder = Path(config.cache_dir)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"--cache-dir {self.folder}: a file is in the way", "name a directory") from None
        self.lock = threading.Lock()
        names = ("asked", "from_cache", "retries", "prompt_tokens", "completion_tokens")
        self.counts = dict.fromkeys(names, 0) | (state or {})
        self.priced = config.price_in is not None
        self.under_way, self.dearest = 0, self.dollars / max(1, self.answers)
        self.stopped = threading.Event()

    @property
    def dollars(self) -> float:
        return self._price(self.counts["prompt_tokens"], self.counts["completion_tokens"])

    @property
    def answers(self) -> int:
        return self.counts["asked"] + self.counts["from_cache"]

    def known(self, request: str) -> Answer | None:
        """The answer to a request that was made before."""
        answer = _read(self._path(self._body(request)))
        if answer is not None:
            self._count(answer, "from_cache")
        return answer

    def ask(self, request: str) -> Answer:
        """The server's answer to one request, kept for the next time.

        Raises Pending, CostReached, and InputError for what no repetition mends (key, model, request): after that and
        CostReached no further request goes out.
        """
        if self.stopped.is_set():
            raise Pending("stopped")
        body = self._body(request)
        path = self._path(body)
        try:
            with self._within_cost():
                answer = self._fetch(body)
                path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # the same request was answered elsewhere, and kept, at this instant
                    write_atomic(path, json.dumps(seal(vars(answer))))
                self._count(answer, "asked")
        except (InputError, CostReached):
            self.stopped.set()
            raise
        return answer

    def _body(self, request: str) -> dict:
        limit = "max_tokens" if self.config.base_url else "max_completion_tokens"
        temperature = self.config.judge_temperature
        if temperature is None and self.config.base_url:
            temperature = 0.0
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": request}],
            limit: self.config.max_tokens,
        } | ({} if temperature is None else {"temperature": temperature})

    def _path(self, body: dict) -> Path:
        key = json.dumps({"server": self.config.base_url or "openai", **body}, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def _fetch(self, body: dict) -> Answer:
        openai, reason = self.openai, ""
        for attempt in range(self.config.retries + 1):
            if attempt and self.stopped.is_set():
                break
            try:
                return self._answer(self.client.chat.completions.create(**body))
            except openai.APIStatusError as e:
                if e.status_code not in _PASSING and e.status_code < 500:
                    raise InputError(
                        f"the judge's server refuses: {e.status_code} ({self._short(e)})",
                        hint="401: OPENAI_API_KEY; 404 and 400: --model, --base-url",
                    ) from None
                reason, wait = f"status {e.status_code} ({self._short(e)})", _retry_after(e.response.headers)
            except (openai.APITimeoutError, openai.APIConnectionError) as e:
                reason, wait = type(e).__name__, 0.0
            except (openai.APIError, ValueError, TypeError, AttributeError, KeyError, IndexError) as e:
                reason, wait = f"a broken response ({type(e).__name__})", 0.0  # not JSON, or none of its fields
            if attempt < self.config.retries:
                with self.lock:
                    self.counts["retries"] += 1
                backoff = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * (0.5 + random.random() / 2)
                self.stopped.wait(max(wait, backoff))
        raise Pending(reason)

    def _answer(self, response) -> Answer:
        """Raises TypeError and its like for what is no answer. One without text (a refusal, all of it reasoning) is."""
        message, usage = response.choices[0].message, response.usage
        text = message.content or getattr(message, "refusal", None) or ""
        if not isinstance(text, str):
            raise TypeError("no text")
        counted = [getattr(usage, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens")]
        if self.config.max_cost is not None and not any(counted):
            raise InputError("--max-cost: the judge's server counts no tokens", hint="leave --max-cost out")
        text = text.encode("utf-8", "replace").decode()  # half a character, escaped, is no text that a file can hold
        return Answer(self._without_key(text), *counted)

    @contextmanager
    def _within_cost(self):
        """Room for one more request under --max-cost; those under way may cost what the dearest answer did."""
        with self.lock:
            limit, at_most = self.config.max_cost, self.dollars + (self.under_way + 1) * self.dearest
            if limit is not None and (at_most > limit * (1 + 1e-9) or self.dollars >= limit):
                raise CostReached
            self.under_way += 1
        try:
            yield
        finally:
            with self.lock:
                self.under_way -= 1

    def _count(self, answer: Answer, source: str) -> None:
        with self.lock:
            self.counts[source] += 1
            self.counts["prompt_tokens"] += answer.prompt_tokens
            self.counts["completion_tokens"] += answer.completion_tokens
            self.dearest = max(self.dearest, self._price(answer.prompt_tokens, answer.completion_tokens))

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars."""
        return (prompt_tokens * (self.config.price_in or 0) + completion_tokens * (self.config.price_out or 0)) / 1e6

    def _short(self, error) -> str:
        lines = str(error.message).strip().splitlines()
        return self._without_key(lines[0])[:160] if lines else type(error).__name__

    def _without_key(self, text: str) -> str:
        """A server may repeat what it was sent; a stand-in such as EMPTY, which local ones are given, is no secret."""
        return text.replace(self.key, "[the key]") if self.key and len(self.key) >= 8 else text


def _read(path: Path) -> Answer | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Answer(**{k: v for k, v in known.items() if k != "id"}) if is_whole(known) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _retry_after(headers) -> float:
    """Seconds that the server asks to wait, given as such or as a date; at most a minute, 0 where it asks nothing."""
    value = headers.get("retry-after")
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(_LONGEST_ASKED_S, seconds) if seconds > 0 else 0.0
