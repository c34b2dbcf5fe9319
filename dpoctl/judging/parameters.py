"""Which parameters of a request the judge's server takes, learnt from its errors."""

import re
from dataclasses import dataclass, replace
from typing import Any

from ..config.judge_options import JudgeOptions
from ..runtime.server_errors import OTHER, ServerError

_LIMITS = ("max_tokens", "max_completion_tokens")
_REFUSING = re.compile(
    r"unsupported|not (?:be )?(?:support|permit|allow|accept|available|recogni[sz]ed|valid|implemented)|"
    r"does(?: not|n't) (?:support|accept|allow|take)|unrecogni[sz]ed|unknown|unexpected|extra|deprecat|invalid|instead|"
    r"only the default|must be|should be|strictly|missing|required|cannot|forbidden|additional propert",
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(r"too large|too high|at most|less than|<=|exceeds|maximum (?:value|allowed)", re.IGNORECASE)


@dataclass(frozen=True)
class Parameters:
    """What requests hold besides model and messages.

    `limit`: the name of the limit on the answer's tokens, max_tokens or max_completion_tokens. `values`: the other
    parameters that are sent. `refused`: those that the server does not take, with the values that they would have.
    """

    limit: str
    max_tokens: int
    values: tuple[tuple[str, float], ...] = ()
    refused: tuple[tuple[str, float], ...] = ()
    swapped: bool = False

    @classmethod
    def first(cls, config: JudgeOptions, state: dict[str, Any]) -> "Parameters":
        """Those of a new run, or those that an earlier call of the command has learnt, from its `state`."""
        temperature = config.judge_temperature
        if temperature is None and config.judge_base_url:
            temperature = 0.0
        values = () if temperature is None else (("temperature", temperature),)
        limit = "max_tokens" if config.judge_base_url else "max_completion_tokens"
        without = state.get("without", ())
        return cls(
            state.get("limit", limit),
            config.judge_max_tokens,
            tuple(v for v in values if v[0] not in without),
            tuple(v for v in values if v[0] in without),
            state.get("limit", limit) != limit,
        )

    @property
    def learnt(self) -> bool:
        """Whether they differ from those of a new run."""
        return self.swapped or bool(self.refused)

    def sent(self) -> dict[str, float]:
        """The parameters of a request by name."""
        return {self.limit: self.max_tokens} | dict(self.values)

    def state(self) -> dict[str, Any]:
        """For `first` of a resumed command."""
        return {"limit": self.limit, "without": [name for name, _ in self.refused]}

    def __str__(self) -> str:
        """As the manifest's cost records it."""
        sent = [f"{name} {value:g}" for name, value in self.sent().items()]
        return ", ".join(sent + [f"{name} not sent: refused by the server" for name, _ in self.refused])

    def without(self, error: ServerError) -> "Parameters | None":
        """The parameters that this error asks for; None where it is not about a parameter that can be changed."""
        if error.status not in (400, 415, 422, 501) or error.content != OTHER:
            return None
        name = self._named(error)
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
        param = error.param.rpartition(".")[2]
        if param in self.sent() or param in _LIMITS:
            return param
        if not _REFUSING.search(f"{error.code.replace('_', ' ')} {error.message}"):
            return ""
        names = [*self.sent(), *_LIMITS]
        places = {n: m.start() for n in names if (m := re.search(rf"(?<!\w){n}(?!\w)", error.message))}
        return min(places, key=lambda n: places[n]) if places else ""
