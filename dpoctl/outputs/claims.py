"""Claiming an output: a command starts it, resumes it, or finds it complete; only one process holds it at a time.

The manifest is written last: its presence means that the output is complete. Until then the output's plan records
the stage, the identity and the inputs that it was started with; a command that differs is refused. Standard library
only.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DpoctlError, InputError, OutputInUse, StorageError
from . import cleanup
from .answers import Answers
from .files import dump, seal, sha256_file, sync_directory, sync_file, write_atomic
from .locks import lock
from .manifests import (
    check_inputs,
    describe_input,
    is_row_file,
    manifest_path,
    plan_path,
    read_manifest,
    read_sealed,
    relative,
    revision_of,
    versions,
)

ROW_STAGES = ("make-prefs", "sample", "score", "evaluate", "judge")
_RUN_FILES = ("config.yaml", "metrics.jsonl", "timing.jsonl", "eval.jsonl", "samples.jsonl", "checkpoints", ".saving")
# suffixes of the files beside an incomplete row output
_UNFINISHED_ROWS = (".partial", ".progress", ".samples.partial", ".samples.progress", ".answers", ".refusals")
_TEXT_SUFFIXES = (".txt", ".json", ".csv", ".jsonl")
_RESTART = "use --overwrite to restart"
_RESTART_OR_KEEP = f"{_RESTART}, or another --out to keep both"


@dataclass(frozen=True)
class Request:
    """The output that a command asks for.

    `options`: all options by name. `identity`: those that may not change when the output is resumed. `inputs`: (option
    name, kind, path) of each input. `recorded`: the inputs as an existing manifest describes them, in place of
    describing the files, which need not exist then.
    """

    out: str
    stage: str
    options: dict[str, Any]
    identity: dict[str, Any]
    inputs: list[tuple[str, str, str]]
    recorded: list[dict[str, Any]] | None = None


class Output:
    """A claimed output. `finished` and `resuming` say what the claim found."""

    def __init__(self, request: Request):
        self.request = request
        self.out = Path(request.out)
        self.stage, self.options, self.identity = request.stage, request.options, request.identity
        self.is_rows = is_row_file(self.out)
        self.finished = self.resuming = self.holds_claim = False
        self.described: list[dict[str, Any]] = []  # the inputs as they were when the output was claimed
        self.answers: Answers | None = None  # of a server, to the requests of the batch that is not yet written
        self.started = time.time()
        self.opened = ExitStack()  # files that are written under locks of their own, closed with the claim

    @property
    def folder(self) -> Path:
        return self.out.parent if self.is_rows else self.out

    @property
    def plan_path(self) -> Path:
        return plan_path(self.out)

    def describe_inputs(self) -> list[dict[str, Any]]:
        """Every input as the manifest records it."""
        if self.request.recorded is not None:
            return self.request.recorded
        inputs = self.request.inputs
        revisions = [revision_of(inputs, i, self._revision(name)) for i, (name, _, _) in enumerate(inputs)]
        return [describe_input(n, path, r, self.folder) for (n, _, path), r in zip(inputs, revisions, strict=True)]

    def fix(self, name: str, value: str) -> str:
        """A value that the output keeps from its start, such as a date: the recorded one, or `value`, now recorded.

        It belongs to the identity in the manifest, so that shards with different values are not merged.
        """
        plan = read_sealed(self.plan_path) or {}
        value = plan.get("identity", {}).get(name, value)
        self.identity[name] = value
        if self.holds_claim and plan and name not in plan["identity"]:
            content = {key: plan[key] for key in ("stage", "inputs")}
            write_atomic(self.plan_path, dump(seal(content | {"identity": plan["identity"] | {name: value}})))
        return value

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
        """Write the manifest, which completes the output.

        `outputs`: (path, number of rows or None). Each further row file gets a copy of the manifest beside it. `shard`:
        which part of a larger output this is.
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
        times = {
            "started": _utc(self.started),
            "finished": _utc(time.time()),
            "wall_seconds": round(time.time() - self.started, 3),
        }
        text = dump(seal(content) | {"cost": times | cost})
        for path, _ in outputs:
            if is_row_file(path) and self.is_rows and path != self.out:
                write_atomic(manifest_path(path), text)
        write_atomic(manifest_path(self.out), text)
        self.plan_path.unlink(missing_ok=True)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@contextmanager
def claim(request: Request, *, overwrite: bool) -> Iterator[Output]:
    """Claim the output for this process, as a context.

    Raises OutputInUse where another process holds it, InputError where --out holds something else, or where the options
    or inputs differ from those that it was started with.
    """
    if request.recorded is None:
        check_inputs(request.inputs)
    _check_place(request)
    output = Output(request)
    created = _make_folder(output.folder)
    try:
        with _locked(output), output.opened:
            _open(output, overwrite)
            output.holds_claim = True
            try:
                yield output
            except (InputError, OutputInUse):
                _forget_if_unwritten(output)
                raise
    except (InputError, OutputInUse, StorageError):
        if created:
            with suppress(OSError):  # not empty: something has been written, and stays
                output.folder.rmdir()
        raise


def follow(request: Request, *, overwrite: bool) -> Output:
    """The output that another process claims for this one: nothing is locked or written.

    `finished` is what the claim finds. Changed options are refused in the same way, and changed inputs of a complete
    output. Those of an incomplete one are left to the claim: hashing a large model takes minutes.
    """
    check_inputs(request.inputs)
    _check_place(request)
    output = Output(request)
    manifest = None if overwrite else read_manifest(output.out)
    if manifest:
        _refuse_changes(output, manifest, output.describe_inputs())
    elif not overwrite and (plan := _read_plan(output, overwrite)):
        _refuse_changed_options(output, plan)
    output.finished = manifest is not None
    return output


def _check_place(request: Request) -> None:
    path, stage = Path(request.out), request.stage
    if is_row_file(path) and path.is_dir():
        raise InputError(f"{path}: is a directory", hint="a row output is a .jsonl file")
    if stage in ROW_STAGES and not is_row_file(path):
        raise InputError(f"{path}: {stage} writes JSONL", hint=_free(path, ".jsonl"))
    if stage not in ROW_STAGES and is_row_file(path):
        raise InputError(f"{path}: {stage} writes a directory", hint=_free(path, ""))
    if any(Path(p).resolve() == path.resolve() for _, _, p in request.inputs):
        raise InputError(f"{path}: is also an input of this command", hint="choose another --out")


def _free(path: Path, suffix: str) -> str:
    """The hint with a name like `path` for an output that ends with `suffix`, where nothing has that name yet."""
    name = path.name.removesuffix(".gz")
    name = f"{name.rpartition('.')[0] or name}{suffix}" if Path(name).suffix in _TEXT_SUFFIXES else f"{name}{suffix}"
    near = path.with_name(name)
    if near != path and not near.exists():
        return f"for example --out {near}"
    return f"choose another --out{f' that ends with {suffix}' if suffix else ''}"


def _forget_if_unwritten(output: Output) -> None:
    """Leave no trace of an output whose input was refused before any of it was written."""
    if output.is_rows:
        unfinished = _unfinished_files(output.out)
        if any(path.exists() and path.stat().st_size for path in unfinished):
            return
        for path in (*unfinished, output.plan_path):
            path.unlink(missing_ok=True)
    elif {p.name for p in output.out.iterdir()} <= {output.plan_path.name, _lock_path(output).name}:
        output.plan_path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> bool:
    """Whether the folder had to be created."""
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder}: is a file; a directory is needed", hint=_free(folder, "")) from None
    return not existed


def _open(output: Output, overwrite: bool) -> None:
    """Start, resume or find complete; or refuse."""
    plan = _read_plan(output, overwrite)
    manifest = None if plan and "removing" in plan else read_manifest(output.out)
    if manifest is None and plan is None:
        _refuse_unknown_content(output)
    if (overwrite and (manifest is not None or plan is not None)) or (plan and "removing" in plan):
        _remove_written(output, manifest, plan)
        manifest = plan = None
    output.described = output.describe_inputs()
    if manifest is not None:
        _refuse_changes(output, manifest, output.described)
        _check_outputs(output, manifest)
        _clean_up_finished(output, manifest)
        os.utime(manifest_path(output.out))  # make compares it with the inputs
        output.finished = True
        return
    if not output.is_rows:
        cleanup.remove_temporary(output.out)
    if plan is not None:
        _refuse_changes(output, plan, output.described)
        output.resuming = True
        return
    start = {"stage": output.stage, "identity": output.identity, "inputs": output.described}
    write_atomic(output.plan_path, dump(seal(start)))


def _read_plan(output: Output, overwrite: bool) -> dict[str, Any] | None:
    try:
        return read_sealed(output.plan_path)
    except InputError as e:
        if overwrite:
            return {}
        raise InputError(e.message, hint=_RESTART) from None


def _check_outputs(output: Output, manifest: dict[str, Any]) -> None:
    for entry in manifest["outputs"]:
        path = output.folder / entry["path"]
        problem = "is missing" if not path.exists() else "" if sha256_file(path) == entry["sha256"] else "has changed"
        if problem:
            raise InputError(f"{output.out}: complete by its manifest, but {entry['path']} {problem}", hint=_RESTART)


def _clean_up_finished(output: Output, manifest: dict[str, Any]) -> None:
    """Remove what was needed until the manifest was written, where a kill came before its removal."""
    if output.is_rows:
        for path in (output.out, *(output.folder / o["path"] for o in manifest["outputs"])):
            remove_unfinished(path)
    elif (keep := output.options.get("keep-checkpoints")) is not None:
        cleanup.prune(output.out, keep, best=False)
    else:
        cleanup.remove_temporary(output.out)
    cleanup.remove(output.plan_path)


def _refuse_unknown_content(output: Output) -> None:
    if output.is_rows:
        if output.out.exists():
            raise InputError(
                f"{output.out}: already exists and has no dpoctl manifest", hint="choose another --out, or remove it"
            )
        return
    harmless = {_lock_path(output).name, f".{output.plan_path.name}.tmp"}  # the latter after a kill at the very start
    found = [p.name for p in output.out.iterdir() if p.name not in harmless]
    if found:
        raise InputError(
            f"{output.out}: is not empty and was not created by dpoctl (it contains {sorted(found)[0]})",
            hint="choose an empty or new directory for --out",
        )


def _refuse_changed_options(output: Output, before: dict[str, Any]) -> None:
    """Raise InputError where stage or identity differ from those in a plan or manifest."""
    if "removing" in before:  # the plan of an output that is being overwritten
        return
    if before["stage"] != output.stage:
        message = f"{output.out}: holds an output of {before['stage']}, not of {output.stage}"
        raise InputError(message, hint=_RESTART_OR_KEEP)
    for key, value in output.identity.items():
        old = before["identity"].get(key, value)
        if old != value:
            message = f"{output.out}: was started with --{key} {old}, now it is {value}"
            raise InputError(message, hint=_RESTART_OR_KEEP)


def _refuse_changes(output: Output, before: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """Raise InputError where stage, identity or inputs differ from those in a plan or manifest."""
    hint = _RESTART_OR_KEEP
    _refuse_changed_options(output, before)
    for then, now, (_, _, path) in zip(before["inputs"], inputs, output.request.inputs, strict=False):
        if then["name"] != now["name"] or (then["sha256"] and now["sha256"] and then["sha256"] != now["sha256"]):
            raise InputError(
                f"{output.out}: was started with a different --{now['name']} ({path} has changed)", hint=hint
            )
    if len(before["inputs"]) != len(inputs):
        names, names_now = {i["name"] for i in before["inputs"]}, {i["name"] for i in inputs}
        name = next(iter(names ^ names_now), "inputs")
        raise InputError(f"{output.out}: was started {'with' if name in names else 'without'} --{name}", hint=hint)


def remove_unfinished(path: Path) -> None:
    """Remove what a row output needs until it is complete."""
    for leftover in _unfinished_files(path):
        cleanup.remove(leftover)


def _unfinished_files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in _UNFINISHED_ROWS]


def _remove_written(output: Output, manifest: dict[str, Any] | None, plan: dict[str, Any] | None) -> None:
    """Remove what dpoctl wrote at an output, and nothing else.

    The plan records first what is being removed. After a kill on the way neither is the old output taken for complete,
    nor the directory for somebody else's.
    """
    written = (plan or {}).get("removing") or [o["path"] for o in (manifest or {}).get("outputs", [])]
    write_atomic(output.plan_path, dump(seal({"stage": output.stage, "removing": written})))
    cleanup.remove(manifest_path(output.out))
    paths = [output.folder / path for path in written]
    paths += _unfinished_files(output.out) if output.is_rows else [output.out / name for name in _RUN_FILES]
    for path in paths:
        cleanup.remove(path)
        if is_row_file(path):
            cleanup.remove(manifest_path(path))
    cleanup.remove(output.plan_path)


def _lock_path(output: Output) -> Path:
    return output.folder / (f".{output.out.name}.lock" if output.is_rows else ".lock")


@contextmanager
def _locked(output: Output) -> Iterator[None]:
    """Hold the output's lock. The kernel releases it when the process ends, however it ends."""
    path = _lock_path(output)
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process was refused, and removed the folder that it had created
            output.folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            lock(fd, str(output.out), "--out")
        except DpoctlError:
            os.close(fd)
            raise
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        os.close(fd)  # its holder removed the file between our open and our lock: retry with the new one
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(fd)
