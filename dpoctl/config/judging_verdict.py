"""Options of how a judge on a server gives its verdict: text or probability, line or JSON, with which thought."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .schema import flag_named, option
from .shared import JUDGE, SERVER

OF_VERDICTS = ("judge_verdict", "judge_answer_format", "judge_reasoning_effort", "judge_extra_body")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_OWN_OPTION = {  # fields of a request that an option sets
    "model": "judge_model",
    "max_tokens": "judge_max_tokens",
    "max_completion_tokens": "judge_max_tokens",
    "temperature": "judge_temperature",
    "logprobs": "judge_verdict",
    "top_logprobs": "judge_verdict",
    "response_format": "judge_answer_format",
    "reasoning_effort": "judge_reasoning_effort",
}
_FIXED = ("messages", "stream", "n")  # the judge reads one complete answer


@dataclass(frozen=True, kw_only=True)
class VerdictOptions:
    """What a verdict is read from, and what makes the judge think."""

    judge_verdict: str = option(
        "text",
        "Read what the judge writes, or the log-probabilities of A and B where it writes its choice (without an "
        "explanation before it).",
        JUDGE,
        choices=("text", "logprobs"),
    )
    judge_answer_format: str = option(
        "line",
        "Ask for a last line 'Preferred: A', or for JSON by a schema; auto: for JSON, or the line if the server takes "
        "no schema.",
        SERVER,
        choices=("line", "json", "auto"),
    )
    judge_reasoning_effort: str | None = option(
        None, "How much a reasoning model thinks, as its server names it.", SERVER, choices=EFFORTS
    )
    judge_extra_body: tuple[str, ...] = option(
        (),
        "Another field of each request, its value as JSON or text; may be given several times.",
        SERVER,
        metavar="KEY=VALUE",
    )

    def check_judge_extra_body(self) -> Iterator[str]:
        flag = flag_named(self, "judge_extra_body")
        names: set[str] = set()
        for text in self.judge_extra_body:
            try:
                name, _ = extra_field(text)
            except ValueError as e:
                yield f"{flag} {text}: {e}"
                continue
            if name in _OWN_OPTION:
                yield f"{flag} {name}: {flag_named(self, _OWN_OPTION[name])} sets it"
            elif name in _FIXED:
                yield f"{flag} {name}: the judge sets it"
            elif name in names:
                yield f"{flag} {name}: given twice"
            names.add(name)


def extra_field(text: str) -> tuple[str, Any]:
    """(name, value) of KEY=VALUE; a value that is not JSON is a text. Raises ValueError with what is wrong."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError("expected KEY=VALUE, such as top_k=1")
    try:
        return name.strip(), json.loads(value, parse_constant=_no_number)
    except json.JSONDecodeError as e:
        if value.lstrip()[:1] in ("{", "[", '"'):
            raise ValueError(f"the value is not valid JSON: {e.msg} at character {e.pos + 1}") from None
        return name.strip(), value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
