"""The SCORER notation, parsed without loading anything. Standard library only.

PATH_OR_HUB_ID[@prob|@logit|@log-odds]   a sequence classifier; a reward model's directory (without a score type)
implicit:POLICY,REFERENCE                DPO's own reward (2305.18290, section 4)
python:FILE.py:FUNCTION                  a function of a list of {"prompt", "completion"}
http://HOST:PORT/PATH                    a server, also https; see inference/remote_scorer.py
mean:SCORER,SCORER,... and min:...       several of the above as one: their mean, or the lowest of their scores
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import InputError, closest

SCORE_TYPES = ("prob", "logit", "log-odds")
COMBINATIONS = ("mean", "min")
MIXED_HINT = "their scales differ: read every classifier as @log-odds or @logit, or every one as @prob"
_UNBOUNDED = ("logit", "log-odds", "reward", "implicit")  # what cannot be combined with a probability


@dataclass(frozen=True)
class ScorerSpec:
    """A parsed SCORER.

    `kind` is `model`, `implicit`, `python`, `remote`, `mean` or `min`; `parts` are (path,), (policy, reference), (file,
    function), (address,) or the members' notations; `score_type` is the one that the notation asks for, None where it
    leaves it open. `members`: the parsed scorers that `mean` and `min` combine.
    """

    kind: str
    parts: tuple[str, ...]
    score_type: str | None = None
    members: tuple["ScorerSpec", ...] = ()

    @property
    def each(self) -> tuple["ScorerSpec", ...]:
        """The scorers that score: the members, or this one."""
        return self.members or (self,)

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """(`file` or `model`, path) of all that the scores depend on."""
        if self.members:
            return tuple(found for member in self.members for found in member.inputs)
        if self.kind == "remote":
            return ()
        return (("file", self.parts[0]),) if self.kind == "python" else tuple(("model", path) for path in self.parts)

    @property
    def models(self) -> tuple[str, ...]:
        """The models among the inputs."""
        return tuple(path for kind, path in self.inputs if kind == "model")

    @property
    def variant(self) -> str:
        """What the content of the inputs does not say: the score type, the function's name, or a server's address."""
        if self.members:  # the kinds say which input belongs to which member
            return f"{self.kind}:" + ",".join(f"{member.kind} {member.variant}".strip() for member in self.members)
        if self.kind == "remote":
            return self.parts[0]
        return self.parts[1] if self.kind == "python" else f"@{self.score_type}" if self.score_type else ""


def model_revisions(spec: ScorerSpec, revision: str | None) -> tuple[str | None, ...]:
    """The revision of each of a SCORER's models, from the value of its --...-revision option.

    A SCORER of several models takes one for all of them, or one for each, separated by commas (of an implicit reward:
    POLICY_REVISION,REFERENCE_REVISION). Raises InputError where one of these is empty, and for another number of them.
    """
    count = len(spec.models)
    if revision is None or count < 2 or "," not in revision:
        return (revision,) * count
    revisions = tuple(part.strip() for part in revision.split(","))
    if len(revisions) != count or not all(revisions):
        if spec.kind == "implicit":
            hint = "write one for both models, or POLICY_REVISION,REFERENCE_REVISION"
            raise InputError(f"revision {revision!r} of an implicit scorer: expected one or two", hint)
        hint = "write one for all models, or one for each in their order, separated by commas"
        raise InputError(f"revision {revision!r} of a scorer of {count} models: expected one or {count}", hint)
    return revisions


def mixed_scales(types: Collection[str]) -> str:
    """Which score types, beside probabilities, have a scale on which a mean or minimum with them says nothing."""
    return ", ".join(sorted(set(types) & set(_UNBOUNDED))) if "prob" in types else ""


def parse_scorer(text: str) -> ScorerSpec:
    """Parse the notation. Raises InputError where it is malformed or names an unknown score type."""
    kind, colon, rest = text.partition(":")
    if colon and kind in COMBINATIONS:
        return _combination(text, kind, rest)
    if colon and kind in ("http", "https"):
        return ScorerSpec("remote", (_address(text),))
    if colon and kind == "implicit":
        policy, comma, reference = (part.strip() for part in rest.partition(","))
        if not (policy and comma and reference) or "," in reference:
            raise InputError(f"scorer {text!r}: expected two models", hint="write implicit:POLICY,REFERENCE")
        return ScorerSpec("implicit", (policy, reference))
    if colon and kind == "python":
        file, colon, function = rest.rpartition(":")
        if not (file and colon and function.isidentifier()):
            raise InputError(f"scorer {text!r}: expected a file and a function", hint="write python:FILE.py:FUNCTION")
        return ScorerSpec("python", (file, function))
    if colon and not Path(text).expanduser().exists():  # a hub id has no colon
        _refuse_prefix(text, kind)
    path, at, score_type = text.rpartition("@")
    if not at or Path(text).expanduser().is_dir():  # a directory's name may contain an @
        path, score_type = text, ""
    elif score_type not in SCORE_TYPES:
        near = closest(score_type, SCORE_TYPES)
        hint = f"did you mean @{near}?" if near else f"score types are {', '.join('@' + t for t in SCORE_TYPES)}"
        raise InputError(f"scorer {text!r}: unknown score type {score_type!r}", hint)
    if not path:
        raise InputError(f"scorer {text!r}: no model named", hint="a directory or hub id of a sequence classifier")
    return ScorerSpec("model", (path,), score_type or None)


def _combination(text: str, kind: str, rest: str) -> ScorerSpec:
    """`mean` or `min` of several scorers. Raises InputError for fewer than two, the same one twice and nested ones."""
    parts: list[str] = []
    for part in map(str.strip, rest.split(",")):
        if parts and parts[-1].startswith("implicit:") and "," not in parts[-1]:
            parts[-1] += f",{part}"  # which names two models
        else:
            parts.append(part)
    if len(parts) < 2 or not all(parts):
        raise InputError(f"scorer {text!r}: expected two scorers or more", hint=f"write {kind}:SCORER,SCORER")
    if twice := next((part for part in parts if parts.count(part) > 1), ""):
        raise InputError(f"scorer {text!r}: names {twice} twice", hint="name each scorer once")
    members = []
    for part in parts:
        if part.partition(":")[0] in COMBINATIONS and ":" in part:
            raise InputError(f"scorer {text!r}: {part} inside {kind}", hint="name the scorers themselves")
        members.append(parse_scorer(part))
    types = [member.score_type for member in members if member.score_type]
    if other := mixed_scales(types):
        raise InputError(f"scorer {text!r}: {kind} of a probability and a {other}", MIXED_HINT)
    return ScorerSpec(kind, tuple(parts), members=tuple(members))


def _address(text: str) -> str:
    """A server's address. Raises InputError where it is malformed, or holds a password, which would be recorded."""
    hint = "write http://HOST:PORT/PATH"
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as e:
        raise InputError(f"scorer {text!r}: not an address: {e}", hint) from None
    if not host or any(c.isspace() for c in text):
        raise InputError(f"scorer {text!r}: not an address", hint)
    if parts.username or parts.password:
        shown = text.replace(parts.netloc, host)
        raise InputError(f"scorer {shown!r}: an address with a password", "give a key in DPOCTL_SCORER_API_KEY")
    if parts.query or parts.fragment:
        raise InputError(f"scorer {text!r}: an address with a query", hint)
    return text


def _refuse_prefix(text: str, prefix: str) -> None:
    """Raise InputError for a SCORER that looks like a mistyped `implicit:` or `python:`, or lacks the latter."""
    rest = text[len(prefix) :]
    if prefix.endswith(".py"):
        near = f"python:{text}"
    elif known := closest(prefix.lower(), ("implicit", "python", *COMBINATIONS)):
        near = f"{known}{rest}"
    else:
        return
    raise InputError(f"scorer {text!r}: neither a model nor implicit:... or python:...", hint=f"did you mean {near}?")
