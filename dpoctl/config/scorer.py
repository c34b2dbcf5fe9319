"""The SCORER notation, read and checked without loading anything.

PATH_OR_HUB[@prob|@logit|@log-odds]    a sequence classifier, or a reward model's directory (no reading then)
implicit:POLICY,REFERENCE              DPO's own reward
python:FILE.py:FUNCTION                a function on a list of {"prompt", "completion"}
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..models.hub import check_path

SCORE_TYPES = ("prob", "logit", "log-odds")


@dataclass(frozen=True)
class ScorerSpec:
    """`kind` is `model`, `implicit` or `python`; `parts` are (path,), (policy, reference) or (file, function)."""

    kind: str
    parts: tuple[str, ...]
    score_type: str | None = None  # as asked for; None where the notation leaves it open


def parse_scorer(spec: str) -> ScorerSpec:
    """Raises InputError for a malformed notation, an unknown reading, and paths that do not exist."""
    kind, colon, rest = spec.partition(":")
    if colon and kind == "implicit":
        policy, comma, reference = (part.strip() for part in rest.partition(","))
        if not (policy and comma and reference) or "," in reference:
            raise InputError(f"scorer {spec!r}: expected two models", hint="write implicit:POLICY,REFERENCE")
        check_path(policy)
        check_path(reference)
        return ScorerSpec("implicit", (policy, reference))
    if colon and kind == "python":
        file, colon, function = rest.rpartition(":")
        if not (file and colon and function.isidentifier()):
            raise InputError(f"scorer {spec!r}: expected a file and a function", hint="write python:FILE.py:FUNCTION")
        if not Path(file).expanduser().is_file():
            raise InputError(f"scorer {spec!r}: no such file: {file}", hint="check the path")
        return ScorerSpec("python", (file, function))
    path, at, score_type = spec.rpartition("@")
    if not at or Path(spec).expanduser().is_dir():  # a directory may have an @ in its name
        path, score_type = spec, None
    elif score_type not in SCORE_TYPES:
        near = difflib.get_close_matches(score_type, SCORE_TYPES, n=1)
        hint = f"did you mean @{near[0]}?" if near else f"readings are {', '.join('@' + r for r in SCORE_TYPES)}"
        raise InputError(f"scorer {spec!r}: unknown reading {score_type!r}", hint)
    if not path:
        raise InputError(f"scorer {spec!r}: no model named", hint="a directory or hub id of a sequence classifier")
    check_path(path)
    return ScorerSpec("model", (path,), score_type)
