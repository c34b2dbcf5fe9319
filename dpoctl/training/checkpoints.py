"""Checkpoints of a training run: safetensors and JSON, whole or absent, checked by their sums when read."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .. import log
from ..artifacts import dump, sha256_file, sync_directory, write_atomic
from ..errors import InputError

KEPT = 2


def save(out: Path, step: int, model, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write `out/checkpoints/step-XXXXXXXX`, then drop all but the newest two."""
    folder = out / "checkpoints"
    final, tmp = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, tmp / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), tmp / "optimizer.safetensors")
        write_atomic(tmp / "state.json", dump(state | {"step": step}))
        names = ("model.safetensors", "optimizer.safetensors", "state.json")
        for name in names:
            _sync_file(tmp / name)
        write_atomic(tmp / "checksums.json", dump({name: sha256_file(tmp / name) for name in names}))
        if final.exists():
            shutil.rmtree(final)
        os.replace(tmp, final)
        sync_directory(folder)
    except OSError:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    prune(out, KEPT)


def save_weights(path: Path, model) -> None:
    """The model's parameters alone, whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, tmp)
    _sync_file(tmp)
    os.replace(tmp, path)


def load_weights(path: Path, model) -> None:
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def prune(out: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints and no temporary ones."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    known = sorted(folder.glob("step-*"))
    for old in known[: len(known) - keep]:
        shutil.rmtree(old, ignore_errors=True)
    if keep == 0:
        shutil.rmtree(folder, ignore_errors=True)


def load_latest(out: Path, model, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole into model and optimizer, and return its state.

    A damaged one is passed over with a warning. None where there is none; InputError where all are damaged.
    """
    known = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    for folder in known:
        if problem := _damage(folder):
            log.warn(f"{folder}: {problem}; falling back to the checkpoint before it")
            continue
        load_weights(folder / "model.safetensors", model)
        _restore_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
        return json.loads((folder / "state.json").read_text())
    if known:
        raise InputError(f"{out}: every checkpoint is damaged", hint="--overwrite starts anew")
    return None


def _damage(folder: Path) -> str:
    try:
        sums = json.loads((folder / "checksums.json").read_text())
        bad = [name for name, digest in sums.items() if sha256_file(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as e:
        return f"cannot be read ({type(e).__name__})"
    return f"{bad[0]} does not fit its checksum" if bad else ""


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def _optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    names = {p: n for n, p in model.named_parameters()}
    return {
        f"{names[p]}:{key}": value.detach().contiguous().reshape(value.shape or (1,))
        for p, entries in optimizer.state.items()
        for key, value in entries.items()
        if isinstance(value, torch.Tensor)
    }


def _restore_optimizer(model, optimizer, tensors: dict[str, torch.Tensor]) -> None:
    by_name = dict(model.named_parameters())
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(":")
        if key == "step":
            optimizer.state[by_name[name]][key] = tensor.reshape(())
        else:
            optimizer.state[by_name[name]][key] = tensor.to(by_name[name].device)
