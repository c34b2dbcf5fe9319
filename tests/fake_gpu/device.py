"""A machine with a CUDA device that is not there, for a CPU build of torch.

`install()` comes before torch is imported: it loads `hooks.cpp`, which makes torch's C++ accept the device, and lets
`torch.cuda` say that there is one. Tensors on it are made by `tensors.FakeGPU`, or by torch's own FakeTensorMode.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

NAME = "fake H100"
MEMORY = 80 * 10**9
_SOURCE = Path(__file__).with_name("hooks.cpp")
_PROPERTIES = SimpleNamespace(
    name=NAME,
    major=9,
    minor=0,
    total_memory=MEMORY,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
)


def missing() -> str:
    """Why the device cannot be made here; empty where it can."""
    if sys.platform != "linux":
        return "the fake CUDA device needs Linux"
    if shutil.which("g++") is None:
        return "the fake CUDA device needs g++"
    # of the installed files, since torch must not be imported yet
    if any((_torch() / "lib").glob("libtorch_cuda*")):
        return "the fake CUDA device needs a CPU build of torch"
    return ""


def build() -> Path:
    """The shared library of hooks.cpp, built unless one of the same content and torch is there."""
    release = f"{version('torch')} {_torch()}"
    digest = hashlib.sha256(_SOURCE.read_bytes() + release.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dpoctl-fake-gpu-{os.getuid()}"
    library = folder / f"hooks-{digest}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        include, lib = _torch() / "include", _torch() / "lib"
        command = ["g++", "-O0", "-w", "-fPIC", "-shared", "-std=c++20", f"-I{include}", str(_SOURCE), "-o", str(part)]
        subprocess.run([*command, f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"], check=True)
        part.replace(library)
    return library


def install() -> None:
    """Load the hooks, import torch, and let it find one CUDA device."""
    assert "torch" not in sys.modules, "the hooks are loaded before torch"
    ctypes.CDLL(str(build()), ctypes.RTLD_GLOBAL)
    import torch

    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": _PROPERTIES,
        "mem_get_info": (MEMORY, MEMORY),
        "get_rng_state_all": [],
        "is_current_stream_capturing": False,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        **dict.fromkeys(("_lazy_init", "synchronize", "set_device", "set_rng_state", "empty_cache", "init")),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _answer(answer))
    torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = torch.cuda.get_rng_state, _answer(None)
    torch.cuda.amp.common.amp_definitely_not_available = _answer(False)
    # Dynamo asks an available one for streams
    accelerator = {"current_accelerator": torch.device("cuda"), "is_available": False, "current_device_index": 0}
    accelerator |= {"device_count": 1, "current_stream": None, "synchronize": None}
    for name, answer in accelerator.items():
        setattr(torch.accelerator, name, _answer(answer))
    # A view of a wrapper in inference mode would have to share its version counter, which inference tensors lack.
    torch.inference_mode = lambda mode=True: torch.no_grad()
    torch._C._cuda_getDevice, torch._C._cuda_setDevice = _answer(0), _answer(None)
    torch._C._cuda_getCurrentRawStream = _answer(0)
    torch.optim.Optimizer._accelerator_graph_capture_health_check = _answer(None)


def _answer(value: object) -> object:
    return lambda *args, **kwargs: value


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    return Path(spec.origin).parent
