"""`dpoctl env`: what a bug report needs to know of the machine and of what is installed."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..outputs.files import cache_home

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "numpy",
    "typer",
    "rich",
    "peft",
    "bitsandbytes",
    "openai",
    "tensorboard",
    "wandb",
)
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
)


def run(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print what `environment` finds, as text or as JSON."""
    found = environment()
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def environment() -> dict[str, Any]:
    """Versions, platform, devices, caches and the environment variables that change how dpoctl runs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return {
        "dpoctl": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"cores": os.cpu_count(), "memory_bytes": _physical_memory()},
        "torch": _torch(),
        "caches": {"hub": _folder(Path(HF_HUB_CACHE)), "dpoctl": _folder(cache_home())},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def _torch() -> dict[str, Any]:
    """Devices with their memory and bfloat16 support; {"error": ...} where torch cannot be imported."""
    try:
        import torch

        from ..runtime.devices import native_bfloat16
    except (ImportError, OSError) as e:  # OSError: a shared library is missing
        return {"error": f"{type(e).__name__}: {e}"}
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "threads": torch.get_num_threads(), "bfloat16": native_bfloat16()}
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": total,
                "free_bytes": free,
                "bfloat16": properties.major >= 8,
            }
        )
    return {"cuda": torch.version.cuda, "distributed": torch.distributed.is_available(), "devices": devices}


def _folder(path: Path) -> dict[str, Any]:
    """Where a cache lies, whether it can be written, and the free space there; of a missing folder, its parent's."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {"path": str(path), "writable": writable, "free_bytes": shutil.disk_usage(existing).free}


def _lines(found: dict[str, Any]) -> list[str]:
    cpu, torch = found["cpu"], found["torch"]
    lines = {name: found[name] for name in ("dpoctl", "python", "executable", "platform")}
    lines |= {name: version or "not installed" for name, version in found["packages"].items()}
    lines["processor"] = f"{cpu['cores']} cores, memory {_gigabytes(cpu['memory_bytes'])}"
    if "error" in torch:
        lines["devices"] = f"torch cannot be imported: {torch['error']}"
    else:
        lines["cuda"] = torch["cuda"] or "not built with CUDA"
        lines |= {device["device"]: _device(device) for device in torch["devices"]}
    for name, folder in found["caches"].items():
        state = "can be written" if folder["writable"] else "CANNOT BE WRITTEN"
        lines[f"{name} cache"] = f"{folder['path']}: {state}, {_gigabytes(folder['free_bytes'])} free"
    lines |= found["variables"]
    width = max(map(len, lines))
    return [f"{name:<{width}}  {value}" for name, value in lines.items()]


def _device(device: dict[str, Any]) -> str:
    parts = [device["name"]] if "name" in device else []
    if "capability" in device:
        parts.append(f"compute capability {device['capability']}")
    if "memory_bytes" in device:
        parts.append(f"{_gigabytes(device['free_bytes'])} free of {_gigabytes(device['memory_bytes'])}")
    if "threads" in device:
        parts.append(f"{device['threads']} threads")
    if "bfloat16" in device:
        parts.append("bfloat16 in hardware" if device["bfloat16"] else "bfloat16 emulated")
    return ", ".join(parts) or "available"


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
