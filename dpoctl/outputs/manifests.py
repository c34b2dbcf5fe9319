"""What goes into a work and what came out of it: inputs by content, manifests, plans. Standard library only."""

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
from .files import is_model_file, is_whole, model_files, sha256_file, sha256_path


def check_inputs(inputs: list[tuple[str, str, str]]) -> None:
    """Raise InputError for a local file that is not there. A model's path may be a hub id: the loader tells."""
    for name, kind, path in inputs:
        if kind == "file" and not os.path.exists(path):
            folder = Path(path).parent
            if not folder.is_dir():
                raise InputError(f"{path}: not found (--{name})", hint=f"the folder {folder} does not exist")
            near = closest(Path(path).name, [p.name for p in folder.iterdir()])
            raise InputError(
                f"{path}: not found (--{name})",
                hint=f"did you mean {folder / near}?" if near else f"see what is in {folder}",
            )


def describe_input(name: str, path: str, revision: str | None, base: Path) -> dict[str, Any]:
    """An input as the manifest holds it: what it is, and who made it.

    Raises InputError for one that is damaged by its producer's manifest, and for one whose producer is not done.
    """
    if not os.path.exists(path):  # a hub id: its commit is its content
        return {"name": name, "path": path, "sha256": _hub_commit(path, revision or "main"), "manifest": None}
    producer = _check_by_producer(name, Path(path))
    size = os.path.getsize(path) if os.path.isfile(path) else sum(p.stat().st_size for p in model_files(path))
    return {
        "name": name,
        "path": relative(path, base),
        "size": size,
        "sha256": sha256_path(path),
        "manifest": producer and producer.get("id"),
    }


def _check_by_producer(name: str, path: Path) -> dict[str, Any] | None:
    """The manifest that lists an input's files, its own or that of the directory it lies in; all must fit it."""
    place = path.absolute()
    for out in (place, place.parent):
        home = out.parent if is_row_file(out) else out
        manifest = read_manifest(out)
        plan = plan_path(out)
        if manifest is None and plan.exists() and (path.is_file() or (place / "config.json").exists()):
            raise InputError(
                f"{path}: of a work that is not complete yet (--{name})", hint=f"finish it first; its plan is {plan}"
            )
        listed = {(home / o["path"]).resolve(): o["sha256"] for o in (manifest or {}).get("outputs", [])}
        own = {p: digest for p, digest in listed.items() if p == place.resolve() or place.resolve() in p.parents}
        for file, digest in own.items():
            if not file.exists() and is_model_file(file.name):
                raise InputError(f"{path}: {file.name} is gone (--{name})", hint="make it again")
            if file.exists() and sha256_file(file) != digest:
                raise InputError(
                    f"{file}: not what {manifest['stage']} wrote: its sha256 does not fit {manifest_path(out)} (--{name})",
                    hint="damaged: copy or make it again. If the change is meant, give it another name",
                )
        if own:
            return manifest
    return None


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
    with suppress(ValueError):
        return os.path.relpath(Path(path).resolve(), base.resolve())
    return str(path)


def manifest_path(out: Path | str) -> Path:
    out = Path(out)
    return out.with_name(out.name + ".manifest.json") if is_row_file(out) else out / "manifest.json"


def read_manifest(out: Path | str) -> dict[str, Any] | None:
    """The manifest of a complete work; None where there is none of dpoctl's. Raises InputError for a damaged one."""
    manifest = read_sealed(manifest_path(out))
    if not manifest or "stage" not in manifest:
        return None
    return (
        manifest if "metrics" in manifest else manifest | {"metrics": manifest.get("figures", {})}
    )  # 0.1 said figures


def read_sealed(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # not JSON, or not even text
        content = None
    if content is None or (isinstance(content, dict) and not is_whole(content)):
        hint = "remove it and what it stands for, and make that again; or choose another --out"
        raise InputError(f"{path}: damaged, not what dpoctl wrote", hint=hint)
    return content if isinstance(content, dict) else None


def plan_path(out: Path) -> Path:
    return out.with_name(out.name + ".plan.json") if is_row_file(out) else out / ".plan.json"


def is_row_file(path: Path | str) -> bool:
    return str(path).endswith((".jsonl", ".jsonl.gz"))


def versions() -> dict[str, str]:
    found = {"dpoctl": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
