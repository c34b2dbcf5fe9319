"""What a language model's server means by an error: OpenAI, Azure, vLLM, llama.cpp and others differ.

An error is about the account, the parameters of every request, the content of this one, or the server's state.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from .http import without_key

FATAL, CONTENT, REFUSED, TRANSIENT = "fatal", "content", "refused", "transient"
CONTENT_FILTER, TOO_LONG, OTHER = "content filter", "too long", "refused by the server"

_TRANSIENT = (408, 409, 425, 429)  # and every status from 500 on
_FATAL = (401, 402, 404, 405, 407)  # key, payment, model or address
_FILTER_CODES = re.compile(
    r"content_?filter|content_policy|responsible_?ai|data_?inspection|invalid_prompt|prohibited_content|moderation|"
    r"guardrail|safety",
    re.IGNORECASE,
)
_FILTER = re.compile(
    r"content[_ -]?filter|content[_ ](?:management )?policy|responsible ?ai|inappropriate content|content exists risk|"
    r"usage polic(?:y|ies)|safety (?:system|polic|filter|reason)|\bflagged\b|requires moderation|guardrail|"
    r"(?:prompt|input|output|request|response|content)(?: was| has been| is)? (?:blocked|filtered)|"
    r"prohibited[_ ]content|sensitive (?:content|information|word)|unsafe content|\u654f\u611f",
    re.IGNORECASE,
)
_LENGTH_CODES = re.compile(
    r"context_length|exceed_context|context_window|request_too_large|string_above_max", re.IGNORECASE
)
_LENGTH = re.compile(
    r"context[_ ](?:length|size|window)|(?:maximum|max|available) context|maximum model length|max_model_len|"
    r"(?:prompt|inputs?|request|message|conversation|query)(?: \([^)]*\)| tokens?| text)? (?:is |are |was )?"
    r"(?:too (?:long|large|big)|longer than)|too many (?:input |prompt )?tokens|"
    r"(?:input|prompt) (?:token count|length|tokens)[^.]*(?:exceed|must be)|token count exceeds|"
    r"inputs` (?:tokens|must have)|reduce (?:the length of|your|the) (?:the )?(?:messages?|prompt|inputs?)|"
    r"payload too large|entity too large",
    re.IGNORECASE,
)
_ACCOUNT_CODES = re.compile(
    r"insufficient_quota|billing|invalid_api_key|authentication|account_deactivated|model_not_found", re.IGNORECASE
)
_ACCOUNT = re.compile(
    r"credit balance|insufficient (?:balance|credit|funds)|api[_ -]?key (?:is )?(?:not valid|invalid|missing)|"
    r"(?:incorrect|invalid) api[_ -]?key|account (?:is|has been|was) (?:suspend|deactivat|disabl)|"
    r"model\b.{0,80}\b(?:does not exist|not found|is not supported|not available)",
    re.IGNORECASE,
)
_BUSY = re.compile(
    r"rate.?limit|too many requests|overloaded|throttl|temporarily unavailable|try again later", re.IGNORECASE
)


@dataclass(frozen=True)
class ServerError:
    """An error response: its HTTP status, and what its body says."""

    status: int
    message: str
    code: str = ""  # codes and types, joined
    param: str = ""  # the parameter that the error is about

    @property
    def kind(self) -> str:
        """FATAL for every request, CONTENT or REFUSED for this one, TRANSIENT where a retry may succeed.

        REFUSED leaves open whether the content is the cause: it is if the server accepts other requests.
        """
        if self.status in (401, 402, 407) or _ACCOUNT_CODES.search(self.code):
            return FATAL
        if self.content != OTHER:
            return CONTENT
        if self.status in _TRANSIENT or self.status >= 500 or _BUSY.search(f"{self.code} {self.message}"):
            return TRANSIENT
        if self.status in _FATAL or _ACCOUNT.search(self.message):
            return FATAL
        return REFUSED

    @property
    def content(self) -> str:
        """CONTENT_FILTER, TOO_LONG or OTHER: what the server has against this request."""
        if _FILTER_CODES.search(self.code):
            return CONTENT_FILTER
        if _LENGTH_CODES.search(self.code) or self.status == 413:
            return TOO_LONG
        if self.status in (401, 404):
            return OTHER
        if self.status == 429:  # a limit of tokens per minute that a single request exceeds
            return TOO_LONG if re.search(r"request too large", self.message, re.IGNORECASE) else OTHER
        if _LENGTH.search(self.message):
            return TOO_LONG
        return CONTENT_FILTER if _FILTER.search(self.message) or self.status == 451 else OTHER

    def __str__(self) -> str:
        detail = " ".join(part for part in (self.code, f"({_shortened(self.message)})" if self.message else "") if part)
        return f"{self.status} {detail}".strip()


def error_in(status: int, text: str, key: str, fallback: str = "") -> ServerError:
    """The error in a response's text, without the key, which a server may repeat; `fallback` as for `read_error`."""
    text = without_key(text, key)
    try:
        body: Any = json.loads(text)
    except ValueError:
        body = text
    return read_error(status, body, fallback)


def read_error(status: int, body: Any, fallback: str = "") -> ServerError:
    """The error in a parsed body: an object, a list of them, a text or an HTML page; `fallback` where it has none."""
    if isinstance(body, list) and body and isinstance(body[0], dict):  # Gemini
        body = body[0]
    if isinstance(body, dict) and body.get("error"):
        body = body["error"]
    if not isinstance(body, dict):
        return ServerError(status, _text(body if isinstance(body, str) and body else fallback))
    inner = body.get("innererror")
    codes = [
        body.get("code"),
        body.get("type"),
        body.get("error_type"),
        inner.get("code") if isinstance(inner, dict) else "",
    ]
    message, param = body.get("message"), body.get("param")
    detail = body.get("detail")  # FastAPI's: a text, or one entry per field
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        entry = detail[0]
        codes.append(entry.get("type"))
        location = [str(part) for part in entry.get("loc") or ()]
        message, param = message or f"{'.'.join(location)}: {entry.get('msg', '')}", param or (location or [""])[-1]
    elif not message:
        message = detail if isinstance(detail, str) else fallback
    known = dict.fromkeys(code for code in codes if isinstance(code, str) and not code.isdigit())
    return ServerError(
        status, _text(f"{message}{_upstream(body)}"), " ".join(known), param if isinstance(param, str) else ""
    )


def status_of(body: Any) -> int:
    """The status that an error inside a response of status 200 names; 500 where it names none."""
    code = body.get("code") if isinstance(body, dict) else None
    if isinstance(code, str) and code.isdigit():
        code = int(code)
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _upstream(body: dict[str, Any]) -> str:
    """What a router adds of the provider behind it."""
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        return ""
    reasons = metadata.get("reasons")
    parts = [metadata.get("raw"), "flagged: " + ", ".join(map(str, reasons)) if isinstance(reasons, list) else ""]
    return "".join(f"; {part}" for part in parts if isinstance(part, str) and part)


def _text(message: str) -> str:
    """One line of text; of an HTML page, as proxies send it, its title."""
    if re.match(r"\s*<(?:!doctype|html|head|body)", message, re.IGNORECASE):
        title = re.search(r"<(title|h1)[^>]*>(.*?)</\1>", message, re.IGNORECASE | re.DOTALL)
        message = "an HTML page" + (f": {title[2].strip()}" if title else "")
    return " ".join(message.split())


def _shortened(message: str, most: int = 300) -> str:
    return message if len(message) <= most else message[: most - 3] + "..."
