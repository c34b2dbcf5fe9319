"""Fault injection: a stage in a forked child whose n-th change of the disk dies, or fails, and the command rerun.

The faults sit where Python meets the disk (file objects, os, safetensors, tokenizers); dpoctl knows nothing of them.
A forked child costs milliseconds: what is imported is imported once, in `faults_warm`.
"""

import builtins
import errno
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

TESTS = Path(__file__).parents[1]
OS_CALLS = ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate", "link")


@dataclass(frozen=True)
class Fault:
    """`kind`: count (note every call), kill or error at call `at`; limit: a file may hold `at` bytes at most."""

    kind: str = "count"
    at: int = 0
    errno: int = errno.ENOSPC


@dataclass
class Outcome:
    code: int  # negative: the signal that ended it
    said: str
    seconds: float


class Gate:
    """Counts the calls that change the disk within `folder`, and lets one of them die or fail."""

    def __init__(self, folder: Path, fault: Fault):
        self.folder, self.fault, self.calls = str(folder), fault, []
        self.writes: dict[str, int] = {}

    def passes(self, name: str, path) -> bool:
        """Whether the call may go on; False where it is the one that fails. Paths elsewhere always may."""
        if not os.path.abspath(os.fsdecode(path)).startswith(self.folder):
            return True
        if name == "write":  # of a file's many writes the first few, then every doubling
            count = self.writes[str(path)] = self.writes.get(str(path), 0) + 1
            if count > 3 and count & (count - 1):
                return True
        self.calls.append(f"{name} {os.path.relpath(os.fsdecode(path), self.folder)}")
        return self.fault.kind == "count" or len(self.calls) != self.fault.at

    def fail(self, path) -> None:
        if self.fault.kind == "kill":
            os._exit(137)
        raise OSError(self.fault.errno, os.strerror(self.fault.errno), os.fsdecode(path))

    def fail_as_rust(self, kind: type, before: str) -> None:
        """Rust's libraries raise kinds of their own that hold the number in their text alone."""
        if self.fault.kind == "kill":
            os._exit(137)
        raise kind(f"{before}{os.strerror(self.fault.errno)} (os error {self.fault.errno})")


class File:
    """A file object whose writes pass the gate; the one that fails leaves half of its bytes."""

    def __init__(self, file, gate: Gate, path):
        self.__dict__.update(file=file, gate=gate, path=path)

    def write(self, data):
        if len(data) and not self.gate.passes("write", self.path):  # of nothing it is matplotlib's question, no change
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            try:
                self.gate.fail(self.path)
            except OSError as e:  # as a real one: the file object does not know its name
                raise OSError(e.errno, e.strerror) from None
        return self.file.write(data)

    def truncate(self, *size):
        if not self.gate.passes("truncate", self.path):
            self.gate.fail(self.path)
        return self.file.truncate(*size)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __setattr__(self, name, value):
        setattr(self.file, name, value)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __iter__(self):
        return iter(self.file)


def install(gate: Gate) -> None:
    """Put the gate before everything that changes the disk."""
    import safetensors.torch
    from safetensors import SafetensorError
    from transformers import PreTrainedTokenizerFast

    real_open, real_serialize = builtins.open, safetensors.torch.serialize_file
    real_tokenizer = PreTrainedTokenizerFast.save_pretrained

    def opened(file, mode="r", *args, **kwargs):
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        if not gate.passes("open", file):
            gate.fail(file)
        return File(real_open(file, mode, *args, **kwargs), gate, file)

    def wrapped(name: str):
        real = getattr(os, name)

        def call(path, *args, **kwargs):
            held = path if isinstance(path, int) else kwargs.get("dir_fd")
            shown = "" if held is None else os.readlink(f"/proc/self/fd/{held}")
            shown = shown if isinstance(path, int) else os.path.join(shown, os.fsdecode(path))
            if not gate.passes(name, shown):
                gate.fail(shown)
            return real(path, *args, **kwargs)

        return call

    def serialize(tensors, path, metadata=None):
        if not gate.passes("serialize", path):
            if gate.fault.kind == "kill":  # a torn file
                real_serialize(tensors, path, metadata=metadata)
                os.truncate(path, os.path.getsize(path) // 2)
            gate.fail_as_rust(SafetensorError, "Error while serializing: I/O error: ")
        real_serialize(tensors, path, metadata=metadata)

    def tokenizer(self, path, *args, **kwargs):
        if not gate.passes("tokenizer", path):
            gate.fail_as_rust(Exception, "")
        return real_tokenizer(self, path, *args, **kwargs)

    builtins.open = io.open = opened
    for name in OS_CALLS:
        setattr(os, name, wrapped(name))
    safetensors.torch.serialize_file = serialize
    PreTrainedTokenizerFast.save_pretrained = tokenizer


def victim(folder: str, argv: list[str], fault: Fault | None, prepare=None) -> None:
    """In the child: one command, from its command line to its exit code. `prepare()` runs before it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what comes before the command has no messages
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    said = os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.dump_traceback_later(240, file=2)
    if prepare:
        prepare()
    if fault and fault.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, fault.at))
    gate = Gate(Path(folder), fault) if fault and fault.kind != "limit" else None
    if gate:
        install(gate)
    from dpoctl.__main__ import main

    sys.argv = ["dpoctl", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    finally:
        if gate and fault.kind == "count":
            os.write(os.open(f"{folder}/calls", os.O_WRONLY | os.O_CREAT), json.dumps(gate.calls).encode())


class Lab:
    """Runs commands of dpoctl in forked children, each trial in a folder of its own two levels below the world."""

    def __init__(self, world: Path):
        self.world, self.trials = world, 0
        self.lock = threading.Lock()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["helpers.faults_warm"])
        path = os.environ.get("PYTHONPATH", "")
        if str(TESTS) not in path.split(os.pathsep):  # the server that forks looks there, and nowhere else of ours
            os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [path])])

    def folder(self) -> Path:
        with self.lock:
            self.trials += 1
            made = self.world / "trials" / f"{self.trials:05d}"
        made.mkdir(parents=True)
        return made

    def start(self, folder: Path, argv: list[str], fault: Fault | None = None, prepare=None):
        process = self.context.Process(target=victim, args=(str(folder), argv, fault, prepare))
        with self.lock:  # a start looks whether other children have ended, whose exit codes can be read but once
            process.start()
        return process

    def running(self, process) -> bool:
        with self.lock:
            return process.exitcode is None

    def end(self, process, folder: Path, timeout: float = 300.0) -> Outcome:
        start = time.monotonic()
        wait([process.sentinel], timeout)
        if self.running(process):
            process.kill()
            wait([process.sentinel])
            self.running(process)
            return Outcome(-signal.SIGALRM, "hangs\n" + (folder / "said").read_text()[-3000:], timeout)
        said = folder / "said"
        return Outcome(process.exitcode, said.read_text() if said.exists() else "", time.monotonic() - start)

    def run(self, folder: Path, argv: list[str], fault: Fault | None = None, prepare=None) -> Outcome:
        return self.end(self.start(folder, argv, fault, prepare), folder)

    def calls(self, argv: list[str], prepare=None) -> tuple[Path, list[str], float]:
        """(folder, the calls that change the disk, seconds) of an undisturbed run."""
        folder = self.folder()
        outcome = self.run(folder, argv, Fault("count"), prepare)
        assert outcome.code == 0, outcome.said
        calls = json.loads((folder / "calls").read_text())
        (folder / "calls").unlink()
        return folder, calls, outcome.seconds


def contents(folder: Path) -> dict[str, str]:
    """What a run left: path -> digest, of manifests without their cost; clocks and caches are left out."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if name == "said" or name.startswith("cache/") or path.name == "timing.jsonl":
            continue
        if path.name != "checksums.json":
            found[name] = hashlib.sha256(_without_clocks(path.name, path.read_bytes())).hexdigest()
    return found


def _without_clocks(name: str, data: bytes) -> bytes:
    try:
        if name == "state.json":  # of a checkpoint: the log of speeds is in it by its size
            return json.dumps(json.loads(data) | {"sizes": 0}).encode()
        if name.endswith("manifest.json"):
            return json.dumps({k: v for k, v in json.loads(data).items() if k != "cost"}).encode()
    except ValueError:
        pass  # damaged, and not read by the run
    return data


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of files that differ or are on one side only; but a stopped run may keep a further checkpoint."""
    extra = {name for name in one.keys() ^ other.keys() if "/checkpoints/step-" in name}
    one, other = ({name: digest for name, digest in side.items() if name not in extra} for side in (one, other))
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def drop(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
