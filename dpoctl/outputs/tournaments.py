"""Who takes part in a tournament of judge: names of candidates, and what a complete one's manifest tells of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .manifests import check_inputs, inputs_of, read_manifest

OPPONENTS = "opponents"  # inputs: the candidates of the tournament that others are added to
_SUFFIXES = (".gz", ".zst", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")


@dataclass(frozen=True)
class Entrant:
    """A candidate of a complete tournament: its file, and the file's hash when it was judged."""

    name: str
    path: str
    sha256: str | None


@dataclass(frozen=True)
class Tournament:
    """The judgements at `path`, complete. `baseline`: whom all others were compared with; None for all pairs."""

    path: str
    manifest: dict[str, Any]
    entrants: list[Entrant]
    baseline: str | None

    @property
    def options(self) -> dict[str, Any]:
        return self.manifest["options"]


def read(path: str) -> Tournament:
    """The tournament whose judgements a file holds; two files that were compared are one too.

    Raises InputError for a file that is no such output, whole and complete.
    """
    check_inputs([("to", "file", path)])
    manifest = read_manifest(path)
    hint = "--to takes the judgements of two or more completions files, as dpoctl judge wrote them"
    if manifest is None or manifest["stage"] != "judge":
        raise InputError(f"{path}: {'no manifest beside it' if manifest is None else 'not an output of judge'}", hint)
    if manifest.get("shard"):
        raise InputError(f"{path}: a shard of a tournament", hint="join the shards with dpoctl merge first")
    for name, what in (("within", "compares the samples of one file"), ("check", "examines a judge")):
        if manifest["options"].get(name):
            raise InputError(f"{path}: {what} (judge --{name})", hint)
    given = inputs_of(manifest, OPPONENTS) + inputs_of(manifest, "candidates")
    given += [b for b in inputs_of(manifest, "baseline") if b["path"] not in {one["path"] for one in given}]
    if len(given) < 2:
        raise InputError(f"{path}: compares one file with the references of its rows", hint)
    paths = [os.path.normpath(Path(path).parent / one["path"]) for one in given]
    names = manifest["metrics"].get("candidates") or names_of(paths)
    entrants = [Entrant(n, p, one["sha256"]) for n, p, one in zip(names, paths, given, strict=True)]
    return Tournament(path, manifest, entrants, manifest["metrics"].get("baseline"))


def names_of(paths: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """A name for each file: its own without suffix, after as many of its folders as make the names differ.

    `taken`: names that belong to others.
    """
    parts = [[*Path(path).resolve().parts[:-1], _stem(path)] for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len({*names, *taken}) == len(names) + len(taken):
            return names
    return [str(Path(path).resolve()) for path in paths]


def _stem(path: str) -> str:
    name = Path(path).name
    while (suffix := Path(name).suffix) in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
