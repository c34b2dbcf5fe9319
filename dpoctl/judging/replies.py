"""What a judge's server replies to one request: an answer, or a refusal of this request alone."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..runtime.server_errors import CONTENT_FILTER, TOO_LONG, ServerError, read_error, status_of
from .probabilities import Token, tokens_of

CUT = "cut at the token limit"
NO_ANSWER = "no answer"
THOUGHT_ONLY = "thought without an answer"
DECLINED = "declined by the judge"
TOO_LONG_FOR_JUDGE = "too long for the judge"

_CUT = ("length", "max_tokens", "model_length", "max_output_tokens")
_FILTERED = (
    "content_filter",
    "safety",
    "recitation",
    "prohibited_content",
    "blocklist",
    "refusal",
    "sensitive",
    "spii",
)
_BROKEN_OFF = ("error", "abort", "insufficient_system_resource")


class ErrorInside(Exception):
    """A response of status 200 that holds an error."""

    def __init__(self, error: ServerError):
        super().__init__(str(error))
        self.error = error


class NoChoice(ValueError):
    """A response of status 200 without any choice, as some servers send for a request that they filter."""


@dataclass(frozen=True)
class Answer:
    """What the judge wrote, the tokens that the server counted for it, and the `reason` if it holds no verdict.

    `tokens`: those of the answer with their log-probabilities, where the server sends them.
    `batch`: it was asked for in a batch file, at the price of those.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    reason: str = ""
    tokens: Sequence[Token] | None = None
    batch: bool = False

    @property
    def raw(self) -> str:
        """What the judgement records."""
        return f"[{self.reason}] {self.text}".strip() if self.reason else self.text

    def stored(self) -> dict[str, Any]:
        """The fields as the cache holds them."""
        return {name: value for name, value in vars(self).items() if name not in ("tokens", "batch") or value}

    def changed(self, change: Callable[[str], str]) -> "Answer":
        """The answer with another text; then its tokens, which do not spell that, are left out."""
        text = change(self.text)
        return self if text == self.text else replace(self, text=text, tokens=None)


@dataclass(frozen=True)
class Refusal:
    """A request that the server refuses while it takes others; `certain` where the error names the content as cause."""

    error: ServerError
    certain: bool

    @property
    def reason(self) -> str:
        return TOO_LONG_FOR_JUDGE if self.error.content == TOO_LONG else self.error.content

    @property
    def raw(self) -> str:
        return f"[{self.reason}] status {self.error}"


Reply = Answer | Refusal


def read_answer(body: str) -> Answer:
    """The answer in the body of a response of status 200.

    An answer without text (a filter, a refusal, reasoning alone) is valid, but has a `reason`. Raises ErrorInside,
    NoChoice, and ValueError or the like for a malformed body.
    """
    try:
        data = json.loads(body)
    except ValueError:
        raise ValueError(str(read_error(200, body[:2000])).removeprefix("200 ") or "empty") from None
    if not isinstance(data, dict):
        raise TypeError("not an object")
    if error := data.get("error"):
        raise ErrorInside(read_error(status_of(error), error))
    if not data["choices"]:
        raise NoChoice("no choice")
    choice = data["choices"][0]
    finish = str(choice.get("finish_reason") or "")
    if choice.get("error") or finish in _BROKEN_OFF:
        found = choice.get("error") or {"message": f"finish_reason {finish}"}
        raise ErrorInside(read_error(status_of(found), found))
    message = choice["message"]
    text, reason = _content(message.get("content")), _reason(message, finish)
    if message.get("refusal") and not text:
        text = str(message["refusal"])
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to a file
    counted = [_count(data.get("usage"), name) for name in ("prompt_tokens", "completion_tokens")]
    return Answer(text, counted[0], counted[1], reason, tokens_of(choice.get("logprobs")))


def _count(usage: Any, name: str) -> int:
    """A number of tokens that a server counted; 0 where it says none: the verdict does not depend on it."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value > 0 else 0


def _reason(message: dict[str, Any], finish: str) -> str:
    """Why a response holds no verdict, whatever its text is; "" where the text decides."""
    if finish.lower().startswith(_FILTERED):
        return f"{CONTENT_FILTER}: finish_reason {finish}"
    if message.get("refusal"):
        return DECLINED
    if finish.lower() in _CUT:
        return CUT
    if _content(message.get("content")).strip():
        return ""
    return THOUGHT_ONLY if message.get("reasoning_content") or message.get("reasoning") else NO_ANSWER


def _content(content: Any) -> str:
    """The text of a message's content: a string, null, or parts, of which thoughts are left out."""
    if content is None:
        return ""
    if isinstance(content, list):
        shown = [p for p in content if not (isinstance(p, dict) and p.get("type") in ("thinking", "reasoning"))]
        parts = [part.get("text") if isinstance(part, dict) else part for part in shown]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise TypeError("content: not a text")
    return content
