"""Shards of a row output: contiguous ranges of its batches, so that a row is the same in any shard; and reading them.

A batch is never split between shards: rounding depends on what shares a batch. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import sha256_file
from .manifests import ENGINE_SETTING, STARTED_ON, manifest_path, read_manifest

_RERUN = "rerun the command that writes it"


def slices(total: int, size: int) -> list[slice]:
    """Slices of `size` consecutive items; the last may be shorter."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@dataclass(frozen=True)
class ShardRange:
    """What shard `number` of `of` covers: these `batches`, items `first` to `first + count` of `total`.

    Items are what batches consist of: prompts (at each temperature), rows, comparisons, or prompts of an evaluation.
    """

    shard: str | None
    number: int
    of: int
    batches: slice
    first: int
    count: int
    total: int

    def record(self, counts: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest's entry for the shard, with the counts that merging adds up; None without --shard."""
        if self.shard is None:
            return None
        places = {name: getattr(self, name) for name in ("number", "of", "first", "count", "total")}
        return places | {"counts": counts}


def shard_range(shard: str | None, batches: Sequence[slice]) -> ShardRange:
    """The range of `--shard` (i/n; None is all) over these batches, as even as batches allow; it may be empty."""
    number, of = map(int, (shard or "1/1").split("/"))
    sizes = [batch.stop - batch.start for batch in batches]
    start, stop = (len(sizes) * part // of for part in (number - 1, number))
    return ShardRange(shard, number, of, slice(start, stop), sum(sizes[:start]), sum(sizes[start:stop]), sum(sizes))


# --- complete shards -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A complete shard on disk. `output` is its index among the files of its manifest: 0 for --out."""

    path: Path
    manifest: dict[str, Any]
    output: int

    @property
    def shard(self) -> dict[str, Any]:
        return self.manifest["shard"]


def read_parts(paths: Sequence[str]) -> list[Part]:
    """Every shard of one output, in order, whatever the order of `paths`.

    Raises InputError for a file that is not a complete and unchanged shard, for shards of different outputs, and for a
    missing or duplicate shard.
    """
    parts = sorted((_part(path) for path in paths), key=lambda part: part.shard["number"])
    first = parts[0]
    for part in parts[1:]:
        if problem := _difference(first, part):
            raise InputError(f"{part.path} and {first.path}: {problem}", hint="merge joins the shards of one output")
    path_of: dict[int, Path] = {}
    for part in parts:
        number, of = part.shard["number"], part.shard["of"]
        if number in path_of:
            twice = f"{path_of[number]} and {part.path}"
            raise InputError(f"shard {number} of {of} is given twice: {twice}", hint="name every shard's file once")
        path_of[number] = part.path
    missing = [str(i) for i in range(1, first.shard["of"] + 1) if i not in path_of]
    if missing:
        many = f"shards {', '.join(missing)} are" if len(missing) > 1 else f"shard {missing[0]} is"
        raise InputError(f"{many} missing of {first.shard['of']}", hint="name every shard's file")
    return parts


def _part(path: str) -> Part:
    file, manifest = Path(path), read_manifest(path)
    if manifest is None:
        if file.with_name(file.name + ".plan.json").exists():
            raise InputError(f"{path}: not complete yet", hint=f"{_RERUN}; it resumes where it stopped")
        raise InputError(
            f"{path}: {'not a shard: it has no manifest' if file.exists() else 'no such file'}",
            hint="name the .jsonl files that were written with --shard i/n",
        )
    if "shard" not in manifest:
        raise InputError(
            f"{path}: not a shard, by {manifest_path(file).name}", hint="shards are written with --shard i/n"
        )
    if not file.is_file():
        raise InputError(f"{path}: complete by its manifest, but missing", hint=f"{_RERUN} with --overwrite")
    names = [Path(output["path"]).name for output in manifest["outputs"]]
    output = names.index(file.name) if file.name in names else 0
    if sha256_file(file) != manifest["outputs"][output]["sha256"]:
        raise InputError(
            f"{path}: changed or damaged: its manifest has another sha256", hint=f"{_RERUN} with --overwrite"
        )
    return Part(file, manifest, output)


def _difference(one: Part, other: Part) -> str:
    """How the outputs of two shards differ, in words; empty for shards of one output."""
    if one.output != other.output:
        return "one belongs to --out, the other to --completions-out"
    return output_difference(one.manifest, other.manifest)


def output_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """How the outputs of two shards differ by their manifests, in words; empty for shards of one output."""
    if one["stage"] != other["stage"]:
        return f"shards of {other['stage']} and of {one['stage']}"
    if one["shard"]["of"] != other["shard"]["of"]:
        return f"of {other['shard']['of']} shards and of {one['shard']['of']}"
    for key in one["identity"] | other["identity"]:
        value, other_value = one["identity"].get(key), other["identity"].get(key)
        if value != other_value and key == STARTED_ON:
            return f"chat templates wrote {other_value} and {value}; --template-date gives all shards one date"
        if value != other_value and key.startswith(ENGINE_SETTING):
            return f"the engine's {key.removeprefix(ENGINE_SETTING)} was {other_value} and {value}"
        if value != other_value and key != "shard":
            return f"--{key} {other_value} and {value}"
    absent: dict[str, Any] = {}  # a scorer may name one file or two
    for used, other_used in zip_longest(one["inputs"], other["inputs"], fillvalue=absent):
        if used.get("name") != other_used.get("name"):
            return f"made from different --{(used or other_used)['name']}"
        if used["sha256"] and other_used["sha256"] and used["sha256"] != other_used["sha256"]:
            return f"made from different --{used['name']}"
    return ""
