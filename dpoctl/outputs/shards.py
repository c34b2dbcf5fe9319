"""Shards of a row work: contiguous ranges of its waves, so that a row is the same in whatever shard; and what joins them.

Rounding depends on what shares a batch, so a work is never cut within a wave (DESIGN section 4). Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import sha256_file
from .manifests import manifest_path, read_manifest

_AGAIN = "give the command that writes it again; it continues where it stopped"


def cut(total: int, size: int) -> list[slice]:
    """Waves of `size` consecutive items; the last may be shorter."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@dataclass(frozen=True)
class Share:
    """What shard `number` of `of` does: these waves of the work, items `first` to `first + count` of its `total`.

    Items are what waves consist of: prompts (at each temperature), rows, comparisons, subjects of an evaluation.
    """

    shard: str | None
    number: int
    of: int
    batches: slice
    first: int
    count: int
    total: int

    def record(self, counts: dict[str, Any]) -> dict[str, Any] | None:
        """What the manifest says of the shard, with the counts that add up to the whole's; None without --shard."""
        if self.shard is None:
            return None
        places = {name: getattr(self, name) for name in ("number", "of", "first", "count", "total")}
        return places | {"counts": counts}


def share_of(shard: str | None, batches: Sequence[slice]) -> Share:
    """The share of `--shard` (i/n; None is all) in a work of these waves, as even as waves allow; it may be empty."""
    number, of = map(int, (shard or "1/1").split("/"))
    sizes = [batch.stop - batch.start for batch in batches]
    start, stop = (len(sizes) * part // of for part in (number - 1, number))
    return Share(shard, number, of, slice(start, stop), sum(sizes[:start]), sum(sizes[start:stop]), sum(sizes))


# --- complete shards -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A complete shard on disk; `output` says which of its work's outputs this file is (0 is --out)."""

    path: Path
    manifest: dict[str, Any]
    output: int

    @property
    def shard(self) -> dict[str, Any]:
        return self.manifest["shard"]


def read_parts(paths: Sequence[str]) -> list[Part]:
    """Every shard of one work, in order, whatever the order of `paths`.

    Raises InputError: a file that is no shard, not complete or not what its manifest says; shards of different works; a
    gap; a duplicate.
    """
    parts = sorted((_part(path) for path in paths), key=lambda part: part.shard["number"])
    first = parts[0]
    for part in parts[1:]:
        if problem := _difference(first, part):
            raise InputError(f"{part.path} and {first.path}: {problem}", hint="merge joins the shards of one work")
    held = {}
    for part in parts:
        number, of = part.shard["number"], part.shard["of"]
        if number in held:
            twice = f"{held[number]} and {part.path}"
            raise InputError(f"shard {number} of {of} is given twice: {twice}", hint="name every shard's file once")
        held[number] = part.path
    missing = [str(i) for i in range(1, first.shard["of"] + 1) if i not in held]
    if missing:
        many = f"shards {', '.join(missing)} are" if len(missing) > 1 else f"shard {missing[0]} is"
        raise InputError(f"{many} missing of {first.shard['of']}", hint="name every one of them")
    return parts


def _part(path: str) -> Part:
    file, manifest = Path(path), read_manifest(path)
    if manifest is None:
        if file.with_name(file.name + ".plan.json").exists():
            raise InputError(f"{path}: not complete yet", hint=_AGAIN)
        raise InputError(
            f"{path}: {'not a shard: it has no manifest' if file.exists() else 'no such file'}",
            hint="name the .jsonl files that were written with --shard i/n",
        )
    if "shard" not in manifest:
        raise InputError(
            f"{path}: not a shard, by {manifest_path(file).name}", hint="shards are written with --shard i/n"
        )
    if not file.is_file():
        raise InputError(f"{path}: complete by its manifest, but the file is gone", hint=_AGAIN + ", with --overwrite")
    names = [Path(output["path"]).name for output in manifest["outputs"]]
    output = names.index(file.name) if file.name in names else 0
    if sha256_file(file) != manifest["outputs"][output]["sha256"]:
        raise InputError(
            f"{path}: not what its manifest says: it was changed or damaged", hint=_AGAIN + ", with --overwrite"
        )
    return Part(file, manifest, output)


def _difference(one: Part, other: Part) -> str:
    """What tells the works of two shards apart, in words; empty for shards of one work."""
    if one.output != other.output:
        return "one holds --out, the other --completions-out"
    return different_work(one.manifest, other.manifest)


def different_work(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What tells the works of two shards' manifests apart, in words; empty for shards of one work."""
    if one["stage"] != other["stage"]:
        return f"shards of {other['stage']} and of {one['stage']}"
    if one["shard"]["of"] != other["shard"]["of"]:
        return f"of {other['shard']['of']} shards and of {one['shard']['of']}"
    for key in one["identity"] | other["identity"]:
        own, others = one["identity"].get(key), other["identity"].get(key)
        if own != others and key != "shard":
            return f"--{key} {others} and {own}"
    for own, others in zip_longest(one["inputs"], other["inputs"], fillvalue={}):  # a scorer may name one file or two
        if own.get("name") != others.get("name"):
            return f"made of another --{(own or others)['name']}"
        if own["sha256"] and others["sha256"] and own["sha256"] != others["sha256"]:
            return f"made of another --{own['name']}"
    return ""
