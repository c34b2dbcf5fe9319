"""Outputs that are either whole or resumable: claims, locks, atomic writes, row files, manifests. Standard library only.

A work claims its output (`claim`), which answers whether to start, to continue or that nothing is left to do; it refuses
where options or inputs are not those that the output was begun with. The manifest is written last: where it stands, the
work is complete.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__
from .errors import InputError, closest

_MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|adapter_config|.*\.index)\.json"
    r"|.*\.(safetensors|bin|model|jinja|py)|merges\.txt|vocab\.txt"
)
_OWN = ("config.yaml", "metrics.jsonl", "timing.jsonl", "eval.jsonl", "checkpoints", ".plan.json")
ROW_STAGES = ("make-prefs", "sample", "score", "evaluate", "judge")
_HASH_CACHE_FROM = 1 << 20  # smaller files are hashed again sooner than looked up


# --- bytes and files -------------------------------------------------------------------------------------------------


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, whole and on disk."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path | str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def dump(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, sort_keys=False) + "\n"


def cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpoctl"


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file; of a large one remembered by path, size, mtime and inode."""
    path = Path(path).resolve()
    info = path.stat()
    known = {"size": info.st_size, "mtime_ns": info.st_mtime_ns, "inode": info.st_ino}
    entry = cache_home() / "sha256" / hashlib.sha256(str(path).encode()).hexdigest()
    if info.st_size >= _HASH_CACHE_FROM:
        with suppress(OSError, ValueError, KeyError):
            cached = json.loads(entry.read_text())
            if {k: cached[k] for k in known} == known:
                return cached["sha256"]
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256") if sys.version_info >= (3, 11) else _digest(f)
    if info.st_size >= _HASH_CACHE_FROM:
        with suppress(OSError):  # a cache that cannot be written only costs time
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(entry, json.dumps(known | {"sha256": digest.hexdigest()}))
    return digest.hexdigest()


def _digest(f):
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest


def model_files(path: Path | str) -> list[Path]:
    """The files of a model directory that say what the model is."""
    return sorted(p for p in Path(path).iterdir() if p.is_file() and _MODEL_FILES.fullmatch(p.name))


def sha256_path(path: Path | str) -> str:
    """SHA-256 of a file, or of a model directory's own files (names and contents)."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in model_files(path):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


# --- inputs and manifests --------------------------------------------------------------------------------------------


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
    """An input as the manifest holds it: what it is, and who made it."""
    if not os.path.exists(path):  # a hub id: its commit is its content
        return {"name": name, "path": path, "sha256": _hub_commit(path, revision or "main"), "manifest": None}
    manifest = read_manifest(path)
    size = os.path.getsize(path) if os.path.isfile(path) else sum(p.stat().st_size for p in model_files(path))
    return {
        "name": name,
        "path": _relative(path, base),
        "size": size,
        "sha256": sha256_path(path),
        "manifest": manifest and manifest.get("id"),
    }


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


def _relative(path: str | Path, base: Path) -> str:
    with suppress(ValueError):
        return os.path.relpath(Path(path).resolve(), base.resolve())
    return str(path)


def manifest_path(out: Path | str) -> Path:
    out = Path(out)
    return out.with_name(out.name + ".manifest.json") if is_row_file(out) else out / "manifest.json"


def read_manifest(out: Path | str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        manifest = json.loads(manifest_path(out).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest, dict) and "stage" in manifest else None
    return None


def is_row_file(path: Path | str) -> bool:
    return str(path).endswith((".jsonl", ".jsonl.gz"))


def versions() -> dict[str, str]:
    found = {"dpoctl": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# --- works -----------------------------------------------------------------------------------------------------------


class Work:
    """A claimed output. `finished` and `resuming` say what the claim found."""

    def __init__(self, out: Path, stage: str, options: dict, identity: dict, inputs: list):
        self.out, self.stage, self.options, self.identity, self.inputs = out, stage, options, identity, inputs
        self.is_rows = is_row_file(out)
        self.finished = self.resuming = False
        self.started = time.time()

    @property
    def folder(self) -> Path:
        return self.out.parent if self.is_rows else self.out

    @property
    def plan_path(self) -> Path:
        return self.out.with_name(self.out.name + ".plan.json") if self.is_rows else self.out / ".plan.json"

    def describe_inputs(self) -> list[dict[str, Any]]:
        return [describe_input(name, path, self.options.get("revision"), self.folder) for name, _, path in self.inputs]

    def finish(self, outputs: list[tuple[Path, int | None]], figures: dict[str, Any], cost: dict[str, Any]) -> None:
        """Write the manifest, last of all. `outputs` are (path, rows or None); further row files get a copy beside them."""
        listed = []
        for path, rows in outputs:
            entry = {"path": _relative(path, self.folder), "size": path.stat().st_size, "sha256": sha256_file(path)}
            listed.append(entry | ({} if rows is None else {"rows": rows}))
        content = {
            "stage": self.stage,
            "versions": versions(),
            "options": self.options,
            "identity": self.identity,
            "inputs": self.describe_inputs(),
            "outputs": listed,
            "figures": figures,
        }
        identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        stamp = {
            "started": _clock(self.started),
            "finished": _clock(time.time()),
            "wall_seconds": round(time.time() - self.started, 3),
        }
        text = dump({"id": identity, **content, "cost": stamp | cost})
        for path, _ in outputs:
            if is_row_file(path) and self.is_rows and path != self.out:
                write_atomic(manifest_path(path), text)
        write_atomic(manifest_path(self.out), text)
        self.plan_path.unlink(missing_ok=True)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@contextmanager
def claim(out: str, stage: str, options: dict, identity: dict, inputs: list, *, overwrite: bool) -> Iterator[Work]:
    """Claim an output for this process.

    Raises InputError where another process holds it, where something else lies there, or where its options or inputs
    are not those it was begun with.
    """
    check_inputs(inputs)
    path = Path(out)
    if is_row_file(path) and path.is_dir():
        raise InputError(f"{out}: is a directory", hint="a row output is a .jsonl file")
    if stage in ROW_STAGES and not is_row_file(path):
        raise InputError(f"{out}: {stage} writes rows", hint=f"name it {path.name}.jsonl")
    if stage not in ROW_STAGES and is_row_file(path):
        raise InputError(f"{out}: {stage} writes a directory", hint=f"--out {path.name.split('.')[0]}")
    if any(Path(p).resolve() == path.resolve() for _, _, p in inputs):
        raise InputError(f"{out}: is an input of this command too", hint="choose another --out")
    work = Work(path, stage, options, identity, inputs)
    created = _make_folder(work.folder)
    try:
        with _locked(path, work):
            _open(work, overwrite)
            try:
                yield work
            except InputError:
                _forget_unbegun(work)
                raise
    except InputError:
        if created:
            with suppress(OSError):  # what has been begun stays
                work.folder.rmdir()
        raise


def _forget_unbegun(work: Work) -> None:
    """Leave nothing of a work whose input was refused before it wrote anything."""
    if work.is_rows:
        beside = [work.out.with_name(work.out.name + end) for end in (".partial", ".progress")]
        if any(path.exists() and path.stat().st_size for path in beside):
            return
        for path in (*beside, work.plan_path):
            path.unlink(missing_ok=True)
    elif {p.name for p in work.out.iterdir()} <= {work.plan_path.name, _lock_path(work).name}:
        work.plan_path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> bool:
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{folder}: is in the way, a file where a directory is to be", hint="choose another --out"
        ) from None
    return not existed


def _open(work: Work, overwrite: bool) -> None:
    """Start, continue or find complete; or refuse."""
    manifest, plan = read_manifest(work.out), _read_json(work.plan_path)
    if manifest is None and plan is None:
        _refuse_foreign(work)
    if overwrite and (manifest or plan):
        _remove_own(work, manifest)
        manifest = plan = None
    now = {"stage": work.stage, "identity": work.identity, "inputs": work.describe_inputs()}
    if manifest is not None:
        _refuse_changes(work, manifest, now)
        missing = [o["path"] for o in manifest["outputs"] if not (work.folder / o["path"]).exists()]
        if missing:
            raise InputError(
                f"{work.out}: complete by its manifest, but {missing[0]} is gone", hint="--overwrite makes it again"
            )
        os.utime(manifest_path(work.out))  # newer than its inputs, so make is content
        work.finished = True
        return
    if plan is not None:
        _refuse_changes(work, plan, now)
        work.resuming = True
        return
    write_atomic(work.plan_path, dump(now))


def _refuse_foreign(work: Work) -> None:
    if work.is_rows:
        if work.out.exists():
            raise InputError(
                f"{work.out}: exists, but dpoctl has no manifest of it", hint="choose another --out, or remove it"
            )
        return
    held = [p.name for p in work.out.iterdir() if p.name != _lock_path(work).name]
    if held:
        raise InputError(
            f"{work.out}: holds something that dpoctl did not begin ({sorted(held)[0]})",
            hint="choose an empty or new directory for --out",
        )


def _refuse_changes(work: Work, before: dict, now: dict) -> None:
    hint = "--overwrite starts anew, another --out keeps both"
    if before["stage"] != now["stage"]:
        raise InputError(f"{work.out}: holds the work of {before['stage']}, not of {now['stage']}", hint=hint)
    for key, value in now["identity"].items():
        old = before["identity"].get(key, value)
        if old != value:
            raise InputError(f"{work.out}: was begun with --{key} {old}, now it is {value}", hint=hint)
    for old, new, (_, _, path) in zip(before["inputs"], now["inputs"], work.inputs, strict=False):
        if old["name"] != new["name"] or (old["sha256"] and new["sha256"] and old["sha256"] != new["sha256"]):
            raise InputError(
                f"{work.out}: was begun with another --{new['name']} ({path} is not what it was)", hint=hint
            )
    if len(before["inputs"]) != len(now["inputs"]):
        old, new = {i["name"] for i in before["inputs"]}, {i["name"] for i in now["inputs"]}
        name = next(iter(old ^ new), "inputs")
        raise InputError(f"{work.out}: was begun {'with' if name in old else 'without'} --{name}", hint=hint)


def _remove_own(work: Work, manifest: dict | None) -> None:
    """Remove what dpoctl wrote at an output, and nothing else."""
    manifest_path(work.out).unlink(missing_ok=True)  # first: nothing half-removed is ever taken for whole
    written = [work.folder / o["path"] for o in (manifest or {}).get("outputs", [])]
    if work.is_rows:
        written += [work.out.with_name(work.out.name + end) for end in (".partial", ".progress")]
    else:
        written += [work.out / name for name in _OWN]
    for path in written:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if is_row_file(path):
            manifest_path(path).unlink(missing_ok=True)
    work.plan_path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict | None:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _lock_path(work: Work) -> Path:
    return work.folder / (f".{work.out.name}.lock" if work.is_rows else ".lock")


@contextmanager
def _locked(out: Path, work: Work) -> Iterator[None]:
    """Hold the output's lock; the kernel frees it when the process dies, however it dies."""
    path = _lock_path(work)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise InputError(
                f"{out}: another dpoctl is at work on it", hint="wait for it, or choose another --out"
            ) from None
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        os.close(fd)  # its holder removed it between our open and our lock: again, with the new one
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(fd)
