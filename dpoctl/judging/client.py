"""A judge behind a chat-completions server: retried, cached by the whole request, counted, and stopped at a cost."""

import hashlib
import json
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path

from ..artifacts import write_atomic
from ..errors import InputError

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_PASSING = (408, 409, 425, 429)  # and everything from 500 on


class Pending(Exception):
    """The request failed for a passing reason, as often as it was tried: it can be made again later."""


class CostReached(Exception):
    """The next request would go past --max-cost."""


@dataclass(frozen=True)
class Answer:
    """What the judge wrote, and the tokens that were counted for it."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Client:
    """`ask(request)` from any number of threads. The key comes from OPENAI_API_KEY and goes nowhere else."""

    def __init__(self, config):
        try:
            import openai
        except ImportError:
            raise InputError(
                "--backend openai: the package is not installed", hint="pip install 'dpoctl[judge]'"
            ) from None
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not config.base_url:
            raise InputError("no key: OPENAI_API_KEY is not set", hint="or --base-url of a server that needs none")
        self.config, self.openai = config, openai
        self.client = openai.OpenAI(
            api_key=key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0
        )
        self.folder = Path(config.cache_dir)
        self.lock = threading.Lock()
        self.spent = 0.0
        self.tokens = {"prompt": 0, "completion": 0}
        self.asked = self.from_cache = self.retries = 0
        self.stopped = threading.Event()

    def ask(self, request: str) -> Answer:
        """The answer to one request, from the cache where it was answered before.

        Raises Pending, CostReached, and InputError for what no repetition mends (key, model, request).
        """
        body = self._body(request)
        path = self._path(body)
        answer = _read(path)
        if answer is not None:
            self._count(answer, cached=True)
            return answer
        answer = self._fetch(body)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(vars(answer)))
        self._count(answer, cached=False)
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
            if self.stopped.is_set():
                raise Pending("stopped")
            with self.lock:
                if self.config.max_cost is not None and self.spent >= self.config.max_cost:
                    raise CostReached
            try:
                return _answer(self.client.chat.completions.create(**body))
            except openai.APIStatusError as e:
                if e.status_code not in _PASSING and e.status_code < 500:
                    raise InputError(
                        f"the judge's server refuses: {e.status_code} ({_short(e)})",
                        hint="401: OPENAI_API_KEY; 404 and 400: --model, --base-url",
                    ) from None
                reason, wait = f"status {e.status_code}", _retry_after(e)
            except (openai.APITimeoutError, openai.APIConnectionError) as e:
                reason, wait = type(e).__name__, None
            except (openai.APIError, ValueError, TypeError, AttributeError, KeyError, IndexError) as e:
                reason, wait = f"a broken response ({type(e).__name__})", None  # not JSON, or none of its fields
            if attempt < self.config.retries:
                with self.lock:
                    self.retries += 1
                backoff = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * (0.5 + random.random() / 2)
                self.stopped.wait(max(wait or 0.0, 0.0 if wait is not None else backoff))
        raise Pending(reason)

    def _count(self, answer: Answer, *, cached: bool) -> None:
        with self.lock:
            self.tokens["prompt"] += answer.prompt_tokens
            self.tokens["completion"] += answer.completion_tokens
            cost = answer.prompt_tokens * (self.config.price_in or 0) + answer.completion_tokens * (
                self.config.price_out or 0
            )
            self.spent += cost / 1e6
            self.asked += not cached
            self.from_cache += cached


def _answer(response) -> Answer:
    text = response.choices[0].message.content
    if not isinstance(text, str):
        raise TypeError("no text")
    usage = response.usage
    return Answer(text, getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)


def _read(path: Path) -> Answer | None:
    try:
        return Answer(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _retry_after(error) -> float | None:
    """Seconds that the server asks to wait, at most a minute."""
    value = error.response.headers.get("retry-after")
    try:
        return min(60.0, max(0.0, float(value)))
    except (TypeError, ValueError):
        return None


def _short(error) -> str:
    lines = str(error.message).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
