"""Outputs that are either whole or resumable: claims, locks, atomic writes, row files, manifests. Standard library only.

A work claims its output (`claim`), which answers whether to start, to continue or that nothing is left to do; it refuses
where options or inputs are not those that the output was begun with. The manifest is written last: where it stands, the
work is complete.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InputError, StorageError
from . import cleanup
from .files import (
    cache_home,
    dump,
    model_files,
    move_into,
    seal,
    sha256_file,
    sha256_path,
    sync_directory,
    sync_file,
    write_atomic,
    writing,
)
from .manifests import (
    check_inputs,
    describe_input,
    is_row_file,
    manifest_path,
    plan_path,
    read_manifest,
    read_sealed,
    relative,
    versions,
)

__all__ = [  # of files and manifests too: what the stages need of outputs is in one place
    "Output",
    "cache_home",
    "check_inputs",
    "claim",
    "describe_input",
    "dump",
    "is_row_file",
    "manifest_path",
    "model_files",
    "move_into",
    "read_manifest",
    "sha256_file",
    "sha256_path",
    "sync_directory",
    "sync_file",
    "write_atomic",
    "writing",
]

_OWN = ("config.yaml", "metrics.jsonl", "timing.jsonl", "eval.jsonl", "samples.jsonl", "checkpoints", ".saving")
_OF_ROWS = (".partial", ".progress")  # what stands beside a row output that is not complete
ROW_STAGES = ("make-prefs", "sample", "score", "evaluate", "judge")


# --- works -----------------------------------------------------------------------------------------------------------


class Output:
    """A claimed output. `finished` and `resuming` say what the claim found."""

    def __init__(
        self, out: Path, stage: str, options: dict, identity: dict, inputs: list, recorded: list | None = None
    ):
        self.out, self.stage, self.options, self.identity, self.inputs = out, stage, options, identity, inputs
        self.recorded = recorded
        self.is_rows = is_row_file(out)
        self.finished = self.resuming = False
        self.described: list[dict[str, Any]] = []  # the inputs as they were when the output was claimed
        self.started = time.time()

    @property
    def folder(self) -> Path:
        return self.out.parent if self.is_rows else self.out

    @property
    def plan_path(self) -> Path:
        return plan_path(self.out)

    def describe_inputs(self) -> list[dict[str, Any]]:
        if self.recorded is not None:
            return self.recorded
        return [describe_input(name, path, self._revision(name), self.folder) for name, _, path in self.inputs]

    def _revision(self, name: str) -> str | None:
        """The option that gives the revision of an input on the Hub."""
        return self.options.get("revision" if name in ("model", "base") else f"{name}-revision")

    def finish(
        self,
        outputs: list[tuple[Path, int | None]],
        metrics: dict[str, Any],
        cost: dict[str, Any],
        shard: dict[str, Any] | None = None,
    ) -> None:
        """Write the manifest, last of all. `outputs` are (path, rows or None); further row files get a copy beside them.

        `shard`: where the work is a part of a larger one, which part.
        """
        listed = []
        for path, rows in outputs:
            sync_file(path)
            entry = {"path": relative(path, self.folder), "size": path.stat().st_size, "sha256": sha256_file(path)}
            listed.append(entry | ({} if rows is None else {"rows": rows}))
        content = {
            "stage": self.stage,
            "versions": versions(),
            "options": self.options,
            "identity": self.identity,
            "inputs": self.described,
            "outputs": listed,
            "metrics": metrics,
        } | ({"shard": shard} if shard else {})
        for folder in {path.parent for path, _ in outputs}:
            sync_directory(folder)
        stamp = {
            "started": _clock(self.started),
            "finished": _clock(time.time()),
            "wall_seconds": round(time.time() - self.started, 3),
        }
        text = dump(seal(content) | {"cost": stamp | cost})
        for path, _ in outputs:
            if is_row_file(path) and self.is_rows and path != self.out:
                write_atomic(manifest_path(path), text)
        write_atomic(manifest_path(self.out), text)
        self.plan_path.unlink(missing_ok=True)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@contextmanager
def claim(
    out: str,
    stage: str,
    options: dict,
    identity: dict,
    inputs: list,
    *,
    overwrite: bool,
    recorded: list[dict] | None = None,
) -> Iterator[Output]:
    """Claim an output for this process.

    `inputs` are (name, kind, path); `recorded` is what a manifest already says of them, where they need not be at hand.
    Raises InputError where another process holds it, where something else lies there, or where its options or inputs
    are not those it was begun with.
    """
    if recorded is None:
        check_inputs(inputs)
    path = Path(out)
    _check_place(path, stage, inputs)
    output = Output(path, stage, options, identity, inputs, recorded)
    created = _make_folder(output.folder)
    try:
        with _locked(path, output):
            _open(output, overwrite)
            try:
                yield output
            except InputError:
                _forget_unbegun(output)
                raise
    except (InputError, StorageError):
        if created:
            with suppress(OSError):  # what has been begun stays
                output.folder.rmdir()
        raise


def follow(out: str, stage: str, options: dict, identity: dict, inputs: list, *, overwrite: bool) -> Output:
    """The work as a process sees it that another one claims it for: nothing is locked or written.

    `finished` is what the claim finds, and options or inputs that are not those it was begun with are refused alike.
    """
    check_inputs(inputs)
    path = Path(out)
    _check_place(path, stage, inputs)
    output = Output(path, stage, options, identity, inputs)
    manifest = None if overwrite else read_manifest(path)
    known = manifest if manifest or overwrite else _read_plan(output, overwrite)
    if known:
        _refuse_changes(output, known, {"stage": stage, "identity": identity, "inputs": output.describe_inputs()})
    output.finished = manifest is not None
    return output


def _check_place(path: Path, stage: str, inputs: list) -> None:
    if is_row_file(path) and path.is_dir():
        raise InputError(f"{path}: is a directory", hint="a row output is a .jsonl file")
    if stage in ROW_STAGES and not is_row_file(path):
        raise InputError(f"{path}: {stage} writes rows", hint=f"name it {path.name}.jsonl")
    if stage not in ROW_STAGES and is_row_file(path):
        raise InputError(f"{path}: {stage} writes a directory", hint=f"--out {path.name.split('.')[0]}")
    if any(Path(p).resolve() == path.resolve() for _, _, p in inputs):
        raise InputError(f"{path}: is an input of this command too", hint="choose another --out")


def _forget_unbegun(output: Output) -> None:
    """Leave nothing of a work whose input was refused before it wrote anything."""
    if output.is_rows:
        beside = _beside(output.out)
        if any(path.exists() and path.stat().st_size for path in beside):
            return
        for path in (*beside, output.plan_path):
            path.unlink(missing_ok=True)
    elif {p.name for p in output.out.iterdir()} <= {output.plan_path.name, _lock_path(output).name}:
        output.plan_path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> bool:
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{folder}: is in the way, a file where a directory is to be", hint="choose another --out"
        ) from None
    return not existed


def _open(output: Output, overwrite: bool) -> None:
    """Start, continue or find complete; or refuse."""
    plan = _read_plan(output, overwrite)
    manifest = None if plan and "removing" in plan else read_manifest(output.out)
    if manifest is None and plan is None:
        _refuse_foreign(output)
    if (overwrite and (manifest is not None or plan is not None)) or (plan and "removing" in plan):
        _remove_own(output, manifest, plan)
        manifest = plan = None
    output.described = output.describe_inputs()
    now = {"stage": output.stage, "identity": output.identity, "inputs": output.described}
    if manifest is not None:
        _refuse_changes(output, manifest, now)
        _check_outputs(output, manifest)
        _tidy_finished(output, manifest)
        os.utime(manifest_path(output.out))  # newer than its inputs, so make is content
        output.finished = True
        return
    if not output.is_rows:
        cleanup.sweep(output.out)
    if plan is not None:
        _refuse_changes(output, plan, now)
        output.resuming = True
        return
    write_atomic(output.plan_path, dump(seal(now)))


def _read_plan(output: Output, overwrite: bool) -> dict | None:
    try:
        return read_sealed(output.plan_path)
    except InputError as e:
        if overwrite:
            return {}
        raise InputError(e.message, hint="--overwrite starts anew") from None


def _check_outputs(output: Output, manifest: dict) -> None:
    for entry in manifest["outputs"]:
        path = output.folder / entry["path"]
        wrong = "is gone" if not path.exists() else "" if sha256_file(path) == entry["sha256"] else "was changed since"
        if wrong:
            raise InputError(
                f"{output.out}: complete by its manifest, but {entry['path']} {wrong}",
                hint="--overwrite makes it again",
            )


def _tidy_finished(output: Output, manifest: dict) -> None:
    """Remove what was needed until the manifest stood, where a kill came between."""
    if output.is_rows:
        for path in (output.out, *(output.folder / o["path"] for o in manifest["outputs"])):
            for leftover in _beside(path):
                cleanup.remove(leftover)
    elif (keep := output.options.get("keep-checkpoints")) is not None:
        cleanup.prune(output.out, keep, best=False)
    else:
        cleanup.sweep(output.out)
    cleanup.remove(output.plan_path)


def _refuse_foreign(output: Output) -> None:
    if output.is_rows:
        if output.out.exists():
            raise InputError(
                f"{output.out}: exists, but dpoctl has no manifest of it", hint="choose another --out, or remove it"
            )
        return
    ours = {_lock_path(output).name, f".{output.plan_path.name}.tmp"}  # the latter of a kill before anything else
    held = [p.name for p in output.out.iterdir() if p.name not in ours]
    if held:
        raise InputError(
            f"{output.out}: holds something that dpoctl did not begin ({sorted(held)[0]})",
            hint="choose an empty or new directory for --out",
        )


def _refuse_changes(output: Output, before: dict, now: dict) -> None:
    hint = "--overwrite starts anew, another --out keeps both"
    if before["stage"] != now["stage"]:
        raise InputError(f"{output.out}: holds the work of {before['stage']}, not of {now['stage']}", hint=hint)
    for key, value in now["identity"].items():
        old = before["identity"].get(key, value)
        if old != value:
            raise InputError(f"{output.out}: was begun with --{key} {old}, now it is {value}", hint=hint)
    for old, new, (_, _, path) in zip(before["inputs"], now["inputs"], output.inputs, strict=False):
        if old["name"] != new["name"] or (old["sha256"] and new["sha256"] and old["sha256"] != new["sha256"]):
            raise InputError(
                f"{output.out}: was begun with another --{new['name']} ({path} is not what it was)", hint=hint
            )
    if len(before["inputs"]) != len(now["inputs"]):
        old, new = {i["name"] for i in before["inputs"]}, {i["name"] for i in now["inputs"]}
        name = next(iter(old ^ new), "inputs")
        raise InputError(f"{output.out}: was begun {'with' if name in old else 'without'} --{name}", hint=hint)


def _beside(path: Path) -> list[Path]:
    return [path.with_name(path.name + end) for end in _OF_ROWS]


def _remove_own(output: Output, manifest: dict | None, plan: dict | None) -> None:
    """Remove what dpoctl wrote at an output, and nothing else.

    What is being removed is noted first, so that a kill on the way leaves neither an old work that looks whole nor a
    directory that looks like somebody else's.
    """
    written = (plan or {}).get("removing") or [o["path"] for o in (manifest or {}).get("outputs", [])]
    write_atomic(output.plan_path, dump(seal({"stage": output.stage, "removing": written})))
    cleanup.remove(manifest_path(output.out))
    paths = [output.folder / path for path in written]
    paths += _beside(output.out) if output.is_rows else [output.out / name for name in _OWN]
    for path in paths:
        cleanup.remove(path)
        if is_row_file(path):
            cleanup.remove(manifest_path(path))
    cleanup.remove(output.plan_path)


def _lock_path(output: Output) -> Path:
    return output.folder / (f".{output.out.name}.lock" if output.is_rows else ".lock")


@contextmanager
def _locked(out: Path, output: Output) -> Iterator[None]:
    """Hold the output's lock; the kernel frees it when the process dies, however it dies."""
    path = _lock_path(output)
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another, refused, took the folder that it had made away
            output.folder.mkdir(parents=True, exist_ok=True)
            continue
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
