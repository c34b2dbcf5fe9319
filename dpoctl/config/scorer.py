"""The SCORER notation, parsed without loading anything. Standard library only.

PATH_OR_HUB_ID[@prob|@logit|@log-odds]   a sequence classifier; a reward model's directory (without a score type)
implicit:POLICY,REFERENCE                DPO's own reward (2305.18290, section 4)
python:FILE.py:FUNCTION                  a function of a list of {"prompt", "completion"}
http://HOST:PORT/PATH                    a server, also https; see inference/remote_scorer.py
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import InputError, closest

SCORE_TYPES = ("prob", "logit", "log-odds")


@dataclass(frozen=True)
class ScorerSpec:
    """A parsed SCORER.

    `kind` is `model`, `implicit`, `python` or `remote`; `parts` are (path,), (policy, reference), (file, function) or
    (address,);
    `score_type` is the one that the notation asks for, None where it leaves it open.
    """

    kind: str
    parts: tuple[str, ...]
    score_type: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The files and models that the scores depend on."""
        return {"python": self.parts[:1], "remote": ()}.get(self.kind, self.parts)

    @property
    def input_kind(self) -> str:
        """What the paths are: `file` or `model`."""
        return "file" if self.kind == "python" else "model"

    @property
    def variant(self) -> str:
        """What the content of the paths does not say: the score type, the function's name, or a server's address."""
        if self.kind == "remote":
            return self.parts[0]
        return self.parts[1] if self.kind == "python" else f"@{self.score_type}" if self.score_type else ""


def model_revisions(spec: ScorerSpec, revision: str | None) -> tuple[str | None, ...]:
    """The revision of each of a SCORER's paths, from the value of its --...-revision option.

    An implicit reward takes one for both of its models, or POLICY_REVISION,REFERENCE_REVISION. Raises InputError where
    one of the two is empty, and for more than two.
    """
    if revision is None or spec.kind != "implicit" or "," not in revision:
        return (revision,) * len(spec.paths)
    revisions = tuple(part.strip() for part in revision.split(","))
    if len(revisions) != 2 or not all(revisions):
        hint = "write one for both models, or POLICY_REVISION,REFERENCE_REVISION"
        raise InputError(f"revision {revision!r} of an implicit scorer: expected one or two", hint)
    return revisions


def parse_scorer(text: str) -> ScorerSpec:
    """Parse the notation. Raises InputError where it is malformed or names an unknown score type."""
    kind, colon, rest = text.partition(":")
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
    elif known := closest(prefix.lower(), ("implicit", "python")):
        near = f"{known}{rest}"
    else:
        return
    raise InputError(f"scorer {text!r}: neither a model nor implicit:... or python:...", hint=f"did you mean {near}?")
