"""Manifests and plans: an output's inputs, identified by content, and what was written. Standard library only."""

import hashlib
import json
import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, closest
from ..runtime import pipes
from ..runtime.hub_data import commit_of, is_hub_data, parse
from .files import content_files, is_intact, is_model_file, sha256_file, sha256_path

ENGINE_SETTING = "engine "  # in the identity, before the name of a setting of the engine, such as its version
_COPIED = {"score": "data", "make-prefs": "samples"}  # stages that copy completions, and the option that names them
STARTED_ON = "started-on"  # in the identity: the day of an output's start, where chat templates write the date


def check_inputs(inputs: list[tuple[str, str, str]]) -> None:
    """Raise InputError for an input file that does not exist, or a pipe that cannot be read.

    A model may be a hub id, which its loader checks; a data set on the Hub is checked where its commit is asked for.
    """
    for name, kind, path in inputs:
        if kind != "file":
            continue
        if is_hub_data(path):
            parse(path)
        elif os.path.exists(path):
            pipes.readable(path)
        else:
            folder = Path(path).parent
            if not folder.is_dir():
                raise InputError(f"{path}: not found ({_flag(name)})", hint=f"the folder {folder} does not exist")
            raise InputError(f"{path}: not found ({_flag(name)})", hint=_instead(Path(path)))


def _instead(path: Path) -> str:
    """What to give in place of a path that does not exist, as a hint."""
    if str(path) == "-":
        return "/dev/stdin reads standard input"
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}"
    try:
        near = closest(path.name, os.listdir(path.parent))
    except OSError:  # no permission
        near = None
    return f"did you mean {path.parent / near}?" if near else f"look in {path.parent}"


def _flag(name: str) -> str:
    if name == "opponents":
        return "a candidate of the tournament in --to"
    # arguments have no flag
    return name.upper() if name in ("inputs", "candidates") else f"--{name}"


def describe_input(name: str, path: str, revision: str | None, base: Path) -> dict[str, Any]:
    """An input as the manifest records it: name, path relative to `base`, content hash, producer's manifest id.

    Raises InputError for an input that does not match its producer's manifest, or whose producer has not finished.
    """
    if is_hub_data(path):
        return _describe_hub_data(name, path, base)
    if pipes.is_pipe(path):
        copy = pipes.readable(path)
        return {"name": name, "path": path, "size": copy.stat().st_size, "sha256": sha256_file(copy), "manifest": None}
    if not os.path.exists(path):  # a hub id: its commit identifies its content
        return {"name": name, "path": path, "sha256": _hub_commit(path, revision or "main"), "manifest": None}
    producer = _check_by_producer(name, Path(path))
    files = [Path(path)] if os.path.isfile(path) else content_files(path)
    size = sum(file.stat().st_size for file in files)
    return {
        "name": name,
        "path": relative(path, base),
        "size": size,
        "sha256": sha256_path(path),
        "manifest": producer and producer.get("id"),
    }


def _describe_hub_data(name: str, path: str, base: Path) -> dict[str, Any]:
    """A data set on the Hub by its commit, one in a directory by the content of its files."""
    data = parse(path)
    if not data.is_local:
        commit = commit_of(data.name, data.revision)
        parts = ":".join(data.parts)  # another split of the same commit is another input
        return {"name": name, "path": path, "sha256": f"{commit}:{parts}" if parts else commit, "manifest": None}
    digest = hashlib.sha256(f"{':'.join(data.parts)}\n".encode())
    places = {p.relative_to(data.name): p for p in sorted(Path(data.name).rglob("*")) if p.is_file()}
    shown = {place: p for place, p in places.items() if not any(part.startswith(".") for part in place.parts)}
    for inside, file in shown.items():
        digest.update(f"{inside} {sha256_file(file)}\n".encode())
    size = sum(file.stat().st_size for file in shown.values())
    place = relative(data.name, base)
    return {"name": name, "path": f"hub:{place}", "size": size, "sha256": digest.hexdigest(), "manifest": None}


def _check_by_producer(name: str, path: Path) -> dict[str, Any] | None:
    """The manifest that lists an input's files, its own or its directory's; the files must match it."""
    place = path.absolute()
    for out in (place, place.parent):
        home = out.parent if is_row_file(out) else out
        manifest = read_manifest(out)
        plan = plan_path(out)
        if manifest is None and plan.exists() and (path.is_file() or (place / "config.json").exists()):
            raise InputError(
                f"{path}: belongs to an output that is not complete yet (--{name})",
                hint=f"complete it first; its plan is {plan}",
            )
        if manifest is None:
            continue
        listed = {(home / o["path"]).resolve(): o["sha256"] for o in manifest.get("outputs", [])}
        produced = {p: digest for p, digest in listed.items() if p == place.resolve() or place.resolve() in p.parents}
        for file, digest in produced.items():
            if not file.exists() and is_model_file(file.name):
                raise InputError(f"{path}: {file.name} is missing (--{name})", hint="rerun the command that writes it")
            if file.exists() and sha256_file(file) != digest:
                raise InputError(
                    f"{file}: its sha256 is not the one in {manifest_path(out)} (--{name})",
                    hint="if it is damaged, copy it or write it again; if you changed it on purpose, rename it",
                )
        if produced:
            return manifest
    return None


def revision_of(inputs: list[tuple[str, str, str]], i: int, revision: str | None) -> str | None:
    """The revision of input `i`, where its option has `revision`: one for all of its models, or one for each."""
    name, kind, _ = inputs[i]
    models = [at for at, other in enumerate(inputs) if other[:2] == (name, "model")]
    each = [part.strip() for part in (revision or "").split(",")]
    return each[models.index(i)] if kind == "model" and len(each) == len(models) > 1 else revision


def _hub_commit(repo: str, revision: str) -> str | None:
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    with suppress(OSError):
        return (cache / f"models--{repo.replace('/', '--')}" / "refs" / revision).read_text().strip()
    return None


def relative(path: str | Path, base: Path) -> str:
    """The path relative to the folder `base`."""
    return os.path.relpath(Path(path).resolve(), base.resolve())


def manifest_path(out: Path | str) -> Path:
    """Where the manifest of an output is: beside a row file, in a directory."""
    out = Path(out)
    return out.with_name(out.name + ".manifest.json") if is_row_file(out) else out / "manifest.json"


def read_manifest(out: Path | str) -> dict[str, Any] | None:
    """The manifest of a complete output, or None. Raises InputError for a damaged one."""
    manifest = read_sealed(manifest_path(out))
    if not manifest or "stage" not in manifest:
        return None
    # Version 0.1 called the metrics "figures".
    return manifest if "metrics" in manifest else manifest | {"metrics": manifest.get("figures", {})}


def inputs_of(manifest: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The inputs that a manifest lists under an option's name, in the order of the command line."""
    return [described for described in (manifest or {}).get("inputs", []) if described["name"] == name]


def sampling_manifest(out: Path | str) -> dict[str, Any] | None:
    """The manifest, with a `model`, of the command that sampled a completions file; None where unknown.

    Where the file is a copy with scores, it is that of the original. Raises InputError for a damaged manifest.
    """
    path = Path(out)
    manifest = read_manifest(path)
    while manifest is not None and manifest["stage"] in _COPIED and not inputs_of(manifest, "model"):
        copied = inputs_of(manifest, _COPIED[manifest["stage"]])
        if len(copied) != 1:
            return None
        path = path.parent / copied[0]["path"]
        manifest = read_manifest(path)
        if manifest is not None and manifest.get("id") != copied[0]["manifest"]:
            return None
    sampled = manifest is not None and manifest["stage"] in ("sample", "make-prefs") and inputs_of(manifest, "model")
    return manifest if sampled else None


def read_sealed(path: Path) -> dict[str, Any] | None:
    """A JSON object written with `seal`, or None. Raises InputError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # not JSON, or not even text
        content = None
    if content is None or (isinstance(content, dict) and not is_intact(content)):
        hint = "remove it and its output and rerun the command, or choose another --out"
        raise InputError(f"{path}: damaged: not what dpoctl wrote", hint=hint)
    return content if isinstance(content, dict) else None


def plan_path(out: Path) -> Path:
    """Where an incomplete output's plan is: what it was started with."""
    return out.with_name(out.name + ".plan.json") if is_row_file(out) else out / ".plan.json"


def is_row_file(path: Path | str) -> bool:
    """Whether an output is a file of rows rather than a directory."""
    return str(path).endswith((".jsonl", ".jsonl.gz"))


def versions() -> dict[str, str]:
    """The versions of dpoctl and of the libraries that decide its results."""
    found = {"dpoctl": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
