"""Checkpoints of a training run: safetensors and JSON, whole or absent, checked by their sums when read.

One holds all that the run needs to go on from there: the weights, the optimizer's state, the run's logs up to there and
the best weights so far, so that damage to the run directory is mended by going back to it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .. import log
from ..artifacts import dump, sha256_file, sync_directory, sync_file, write_atomic, writing
from ..errors import InputError, NumericalError
from ..tidy import BEST, prune, remove

KEPT = 2


def save(out: Path, step: int, model, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write `out/checkpoints/step-XXXXXXXX`, then drop all but the newest two.

    `state["sizes"]` are the bytes, up to here, of the run's logs by name; `state["best"]` is set where best weights have
    been put aside. Raises StorageError; what stood before stands.
    """
    folder = out / "checkpoints"
    final, tmp = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    weights, optimizer_tensors = _weights(model), _optimizer_tensors(model, optimizer)
    with writing(tmp, _bytes(weights) + _bytes(optimizer_tensors)):
        try:
            tmp.mkdir(parents=True)
            save_file(weights, tmp / "model.safetensors")
            save_file(optimizer_tensors, tmp / "optimizer.safetensors")
            for name, size in state.get("sizes", {}).items():
                _copy(out / f"{name}.jsonl", tmp / f"{name}.jsonl", size)
            if state.get("best"):
                _link(out / BEST, tmp / BEST.name)
            write_atomic(tmp / "state.json", dump(state | {"step": step}))
            files = sorted(tmp.iterdir())
            for file in files:
                sync_file(file)
            write_atomic(tmp / "checksums.json", dump({file.name: sha256_file(file) for file in files}))
            if final.exists():
                remove(final)
            os.replace(tmp, final)
            sync_directory(folder)
        except Exception:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    for passed_over in folder.glob("step-*"):
        if passed_over.name > final.name:  # damaged: the run went back behind it
            remove(passed_over)
    prune(out, KEPT)


def check_finite(model, optimizer: torch.optim.Optimizer | None, where: str, hint: str) -> None:
    """Raise NumericalError where a weight, or a number of the optimizer's, is not finite."""
    tensors = _weights(model) | (_optimizer_tensors(model, optimizer) if optimizer else {})
    bad = next((n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
    if bad:
        raise NumericalError(f"{where}: left {bad} with a number that is not finite; it is not saved", hint=hint)


def save_best(out: Path, model) -> str:
    """Put the model's weights aside as the best so far; returns their SHA-256."""
    path = out / BEST
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp, weights = path.with_name(f".{path.name}.tmp"), _weights(model)
    with writing(path, _bytes(weights)):
        try:
            save_file(weights, tmp)
            sync_file(tmp)
            os.replace(tmp, path)
        except Exception:
            tmp.unlink(missing_ok=True)
            raise
    return sha256_file(path)


def load_best(out: Path, model, sha256: str) -> None:
    """Load the weights that were put aside. Raises InputError where they are not those any more."""
    if not (out / BEST).exists() or sha256_file(out / BEST) != sha256:
        raise InputError(f"{out / BEST}: damaged", hint="the same command again continues from the last checkpoint")
    load_weights(out / BEST, model)


def load_weights(path: Path, model) -> None:
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def load_latest(out: Path, model, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole into model, optimizer and run directory, and return its state.

    A damaged one is passed over with a warning. None where there is none; InputError where all are damaged.
    """
    known = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    for folder in known:
        if problem := _damage(folder):
            log.warn(f"{folder}: {problem}; falling back to the checkpoint before it")
            continue
        load_weights(folder / "model.safetensors", model)
        _restore_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
        state = json.loads((folder / "state.json").read_text())
        for name in state.get("sizes", {}):
            write_atomic(out / f"{name}.jsonl", (folder / f"{name}.jsonl").read_bytes())
        if state.get("best"):
            with writing(out / BEST):
                (out / BEST).unlink(missing_ok=True)
                _link(folder / BEST.name, out / BEST)
        return state
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


def _copy(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes of a file."""
    with open(source, "rb") as f, open(target, "wb") as g:
        while size > 0 and (block := f.read(min(size, 1 << 20))):
            g.write(block)
            size -= len(block)


def _link(source: Path, target: Path) -> None:
    """The same content under another name, without a copy where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().contiguous() for n, p in model.named_parameters()}


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


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
