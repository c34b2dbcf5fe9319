"""Which parameters of a request the judge's server takes, learnt from its errors."""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from ..config.judge_options import JudgeOptions
from ..config.judging_verdict import extra_field
from ..config.schema import flag_named
from ..errors import InputError
from ..runtime.server_errors import OTHER, ServerError
from .prompts import load_criterion
from .structured import in_words, response_format

_TOP, _FEWER = 20, 5  # alternatives of each token: the most that OpenAI and vLLM give, and what others do
_FORM = "response_format"
_CALLED = {  # how errors name a parameter, where not by its name
    _FORM: r"response[ _]format|json[_ ]schema|structured[_ ]outputs?|guided_json",
    "logprobs": r"logprobs|log[ -]?prob(?:abilitie)?s",
}
_NAMED = frozenset(  # parameters of the client's method; others travel in its extra_body
    ("model", "messages", "temperature", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", _FORM)
) | {"reasoning_effort"}
_LIMITS = ("max_tokens", "max_completion_tokens")
_REFUSING = re.compile(
    r"unsupported|not (?:be )?(?:support|permit|allow|accept|available|recogni[sz]ed|valid|implemented)|"
    r"does(?: not|n't) (?:support|accept|allow|take)|unrecogni[sz]ed|unknown|unexpected|extra|deprecat|invalid|instead|"
    r"only the default|must be|should be|strictly|missing|required|cannot|forbidden|additional propert|unavailable|"
    r"not enabled|enabled only",
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(r"too large|too high|at most|less than|<=|exceeds|maximum (?:value|allowed)", re.IGNORECASE)
_TOO_MANY = re.compile(rf"{_TOO_LARGE.pattern}|greater than|max(?:imum)? allowed|between 0 and", re.IGNORECASE)


@dataclass(frozen=True)
class Parameters:
    """What requests hold besides model and messages.

    `limit`: the name of the limit on the answer's tokens, max_tokens or max_completion_tokens. `values`: the other
    parameters that are sent. `refused`: those that the server does not take, with the values that they would have.
    `required`: those without which the command does not go on, each with the hint that says what then.
    """

    limit: str
    max_tokens: int
    values: tuple[tuple[str, Any], ...] = ()
    refused: tuple[tuple[str, Any], ...] = ()
    swapped: bool = False
    required: tuple[tuple[str, str], ...] = ()

    @classmethod
    def first(cls, config: JudgeOptions, state: dict[str, Any]) -> "Parameters":
        """Those of a new run, or those that an earlier call of the command has learnt, from its `state`."""
        limit = "max_tokens" if config.judge_elsewhere else "max_completion_tokens"
        without = state.get("without", ())
        values = tuple((_values(config) | state.get("changed", {})).items())
        return cls(
            state.get("limit", limit),
            config.judge_max_tokens,
            tuple(v for v in values if v[0] not in without),
            tuple(v for v in values if v[0] in without),
            state.get("limit", limit) != limit,
            tuple(_required(config).items()),
        )

    @property
    def learnt(self) -> bool:
        """Whether they differ from those of a new run."""
        return self.swapped or bool(self.refused) or self._fewer

    @property
    def _fewer(self) -> bool:
        return dict(self.values).get("top_logprobs") == _FEWER

    @property
    def addition(self) -> str:
        """What a request's text says of the form of the answer, where it has one."""
        form = dict(self.values).get(_FORM)
        return in_words(form) if form else ""

    def sent(self) -> dict[str, Any]:
        """The parameters of a request by name."""
        return {self.limit: self.max_tokens} | dict(self.values)

    def state(self) -> dict[str, Any]:
        """For `first` of a resumed command."""
        changed = {"changed": {"top_logprobs": _FEWER}} if self._fewer else {}
        return {"limit": self.limit, "without": [name for name, _ in self.refused]} | changed

    def __str__(self) -> str:
        """As the manifest's cost records it."""
        sent = [f"{name} {_shown(value)}" for name, value in self.sent().items()]
        return ", ".join(sent + [f"{name} not sent: refused by the server" for name, _ in self.refused])

    def told_without(self, name: str) -> str:
        """A parameter that the server refuses, and what follows from that."""
        value = _shown(dict(self.values)[name])
        if name == _FORM:
            return f"{name} {value}: it is not sent, and the judge is asked for a labelled line"
        return (
            f"{name} {value}: it is not sent, and the judge answers at the server's own {name}, so that verdicts may "
            f"differ from those at {value} and between runs"
        )

    def without(self, error: ServerError) -> "Parameters | None":
        """The parameters that this error asks for; None where it is not about a parameter that can be changed.

        Raises InputError where the server refuses a required one.
        """
        if error.status not in (400, 403, 415, 422, 501) or error.content != OTHER:
            return None
        name, required = self._named(error), dict(self.required)
        if name in ("logprobs", "top_logprobs") and not self._fewer and _TOO_MANY.search(error.message):
            values = dict(self.values) | {"top_logprobs": _FEWER}
            return replace(self, values=tuple(values.items()))
        if name in required and name in dict(self.values):
            shown = f"{name} {_shown(dict(self.values)[name])}"
            raise InputError(f"the judge's server refuses {shown}: {error}", required[name])
        if error.status == 403:
            return None
        if name == self.limit:
            other = _LIMITS[1 - _LIMITS.index(self.limit)]
            return None if self.swapped or _TOO_LARGE.search(error.message) else self._with_limit(other)
        if name in _LIMITS:  # the one that is not sent is asked for
            return None if self.swapped else self._with_limit(name)
        left = tuple(v for v in self.values if v[0] != name)
        refused = tuple(v for v in self.values if v[0] == name)
        return replace(self, values=left, refused=self.refused + refused) if refused else None

    def _with_limit(self, name: str) -> "Parameters":
        return replace(self, limit=name, swapped=True)

    def _named(self, error: ServerError) -> str:
        """The parameter that the error is about: its `param`, else the first that its message names; "" for none."""
        for part in reversed(error.param.split(".")):
            if part in self.sent() or part in _LIMITS:
                return part
        said = f"{error.code.replace('_', ' ')} {error.message}"
        if not _REFUSING.search(said) and not ("logprobs" in self.sent() and _TOO_MANY.search(said)):
            return ""
        places = {}
        for name in [*self.sent(), *_LIMITS]:
            called = _CALLED.get(name, re.escape(name))
            if found := re.search(rf"(?<!\w)(?:{called})(?!\w)", error.message, re.IGNORECASE):
                places[name] = found.start()
        return min(places, key=lambda n: places[n]) if places else ""


def as_call(body: dict[str, Any]) -> dict[str, Any]:
    """A request's body as arguments of the client's method."""
    extra = {name: value for name, value in body.items() if name not in _NAMED}
    named = {name: value for name, value in body.items() if name in _NAMED}
    return named | ({"extra_body": extra} if extra else {})


def _values(config: JudgeOptions) -> dict[str, Any]:
    """The parameters of a new run, but for the limit."""
    temperature = config.judge_temperature
    if temperature is None and config.judge_elsewhere:
        temperature = 0.0
    values: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    soft = config.judge_verdict == "logprobs"
    if soft:
        values |= {"logprobs": True, "top_logprobs": _TOP}
    if config.judge_answer_format != "line":
        template = load_criterion(config.criterion, config.prompt_noun).template
        values[_FORM] = response_format(template, explained=not soft)
    if config.judge_reasoning_effort:
        values["reasoning_effort"] = config.judge_reasoning_effort
    return values | _extra(config)


def _required(config: JudgeOptions) -> dict[str, str]:
    """The parameters that are not left out where the server refuses them, each with a hint."""
    verdict, form, effort, extra = (
        flag_named(config, f"judge_{name}") for name in ("verdict", "answer_format", "reasoning_effort", "extra_body")
    )
    soft = f"{verdict} text reads what the judge writes; reasoning models of OpenAI give no log-probabilities"
    found = dict.fromkeys(("logprobs", "top_logprobs"), soft)
    if config.judge_answer_format == "json":
        found[_FORM] = f"{form} auto asks for a labelled line where the server takes no schema"
    found["reasoning_effort"] = f"leave {effort} out, or give another one; some servers take a field in {extra}"
    return found | {name: f"leave {extra} {name} out" for name in _extra(config)}


def _extra(config: JudgeOptions) -> dict[str, Any]:
    """The fields of --extra-body by name."""
    return dict(map(extra_field, config.judge_extra_body))


def _shown(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, dict) and "json_schema" in value:
        return "json_schema"
    return value if isinstance(value, str) else json.dumps(value)
