"""Checkpoints of a training run: safetensors and JSON, complete or absent, verified by checksums when read.

A checkpoint holds all that resuming needs: the weights, the optimizer's state, the run's logs so far and the best
weights so far, so that damage to the run directory is repaired from it.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import log
from ..errors import InputError, NumericalError
from ..outputs.cleanup import BEST, prune, remove
from ..outputs.files import dump, sha256_file, sync_directory, sync_file, use_mode_of_new_files, write_atomic, writing
from ..runtime import collectives, fsdp, sharded_tensors
from ..runtime.fsdp_root import is_sharded
from ..runtime.long_work import long_work
from ..runtime.sharing import on_rank_0

KEPT = 2
_SHARED = ("qmap1", "qmap2")  # tables that all weights' 8-bit states share


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    further: dict[str, Tensor] | None = None,
) -> None:
    """Write `out/checkpoints/step-XXXXXXXX`, then remove all but the newest two.

    `further` tensors follow the trained weights (a reference that moves, target heads); of a sharded model they are
    sharded too. `state["sizes"]`
    holds the bytes of the run's logs so far, by name; `state["best"]` is set where best weights have been saved. Called
    on every rank: each writes its shard of a sharded model, and rank 0 the rest. Raises StorageError, and keeps the
    earlier checkpoints.
    """
    folder, first, sharded = out / "checkpoints", collectives.rank() == 0, is_sharded(model)
    final, tmp = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    further = further or {}
    weights, optimizer_tensors = _weights(model), _optimizer_tensors(model, optimizer)
    if first:
        shutil.rmtree(tmp, ignore_errors=True)
    with writing(tmp, sum(map(_bytes, (weights, optimizer_tensors, further)))):
        try:
            if first:
                tmp.mkdir(parents=True)
            collectives.from_rank_0(None)  # the folder exists
            with long_work():
                written = []
                if first or sharded:
                    written.append(sharded_tensors.write(tmp, "model", weights, sharded))
                    written.append(sharded_tensors.write(tmp, "optimizer", optimizer_tensors, sharded))
                    written += [sharded_tensors.write(tmp, "further", further, sharded)] if further else []
                if first:
                    written += _write_state(out, tmp, state | {"step": step})
                for file in written:
                    use_mode_of_new_files(file)
                    sync_file(file)
                hashed = {file.name: sha256_file(file) for file in written}
            sums = collectives.gather(hashed)
            if first:
                write_atomic(tmp / "checksums.json", dump({name: s for each in sums for name, s in each.items()}))
                if final.exists():
                    remove(final)
                os.replace(tmp, final)
                sync_directory(folder)
        except Exception:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    if not first:
        return
    for damaged in folder.glob("step-*"):
        if damaged.name > final.name:  # the run was resumed from an earlier one
            remove(damaged)
    prune(out, KEPT)


def _write_state(out: Path, tmp: Path, state: dict[str, Any]) -> list[Path]:
    """Write what is not tensors, and the best weights so far; returns the files."""
    for name, size in state.get("sizes", {}).items():
        _copy(out / f"{name}.jsonl", tmp / f"{name}.jsonl", size)
    best = [tmp / BEST.name] if state.get("best") else []
    if best:
        _link(out / BEST, best[0])
    write_atomic(tmp / "state.json", dump(state))
    return [tmp / "state.json", *best, *(tmp / f"{name}.jsonl" for name in state.get("sizes", {}))]


def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer | None, where: str, hint: str) -> None:
    """Raise NumericalError, on every rank, where a weight or a value of the optimizer's state is not finite."""
    tensors = _weights(model) | (_optimizer_tensors(model, optimizer) if optimizer else {})
    local = ((name, fsdp.local_part(t)) for name, t in tensors.items())
    bad = next((n for n, t in local if t.is_floating_point() and not bool(t.isfinite().all())), None)
    bad = next(filter(None, collectives.gather(bad)), None)
    if bad:
        raise NumericalError(f"{where}: {bad} is not finite; it is not saved", hint=hint)


def save_best(out: Path, model: nn.Module) -> str:
    """Save the trained weights as the best so far; returns their SHA-256. Called on every rank."""
    weights = fsdp.full_tensors(_weights(model))
    return on_rank_0(lambda: _write_best(out / BEST, weights))


def _write_best(path: Path, weights: dict[str, Tensor]) -> str:
    """Write the best weights; returns their SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    with writing(path, _bytes(weights)):
        try:
            save_file({name: t.contiguous() for name, t in weights.items()}, tmp)
            use_mode_of_new_files(tmp)
            sync_file(tmp)
            os.replace(tmp, path)
        except Exception:
            tmp.unlink(missing_ok=True)
            raise
    return sha256_file(path)


def load_best(out: Path, model: nn.Module, sha256: str) -> None:
    """Load the best weights. Raises InputError, on every rank, where the file was changed. Called on every rank."""
    if not on_rank_0(lambda: (out / BEST).exists() and sha256_file(out / BEST) == sha256):
        raise InputError(f"{out / BEST}: damaged", hint="rerun the command to resume from the last checkpoint")
    sharded_tensors.read((out / BEST).parent, BEST.stem, _weights(model))


def load_latest(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, further: dict[str, Tensor] | None = None
) -> dict[str, Any] | None:
    """Load the newest undamaged checkpoint into model, optimizer, `further` tensors and run directory; its state.

    Damaged ones are skipped with a warning. None where there is no checkpoint; InputError where all are damaged. Called
    on every rank: each verifies a share of the files.
    """
    known = collectives.from_rank_0(sorted((out / "checkpoints").glob("step-*"), reverse=True))
    found = _newest_undamaged(known)
    if found:
        with long_work():
            sharded_tensors.read(found, "model", _weights(model))
            _restore_optimizer(model, optimizer, found)
            _restore_further(found, further or {})
            state = json.loads((found / "state.json").read_text())
            if collectives.rank() == 0:
                _restore_files(out, found, state)
        return state
    if known:
        raise InputError(f"{out}: every checkpoint is damaged", hint="use --overwrite to restart")
    return None


def _restore_further(found: Path, further: dict[str, Tensor]) -> None:
    """Fill the further tensors. Raises InputError for a checkpoint that does not hold them all."""
    held = sharded_tensors.kinds(found, "further")
    missing = [name for name in further if name not in held]
    if missing:
        hint = "it is that of another version of dpoctl; use --overwrite to restart"
        raise InputError(f"{found}: does not hold {missing[0]}", hint=hint)
    sharded_tensors.read(found, "further", further)


def _restore_files(out: Path, found: Path, state: dict[str, Any]) -> None:
    for name in state.get("sizes", {}):
        write_atomic(out / f"{name}.jsonl", (found / f"{name}.jsonl").read_bytes())
    if state.get("best"):
        with writing(out / BEST):
            (out / BEST).unlink(missing_ok=True)
            _link(found / BEST.name, out / BEST)


def _newest_undamaged(known: list[Path]) -> Path | None:
    for folder in known:
        with long_work():
            damage = _damage(folder)
        problem = next(filter(None, collectives.gather(damage)), "")
        if not problem:
            return folder
        log.warn(f"{folder}: {problem}; falling back to the checkpoint before it")
    return None


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint that this rank verifies; empty where nothing is."""
    try:
        sums = json.loads((folder / "checksums.json").read_text())
        mine = [name for i, name in enumerate(sums) if _verifier(name, i) == collectives.rank()]
        bad = [name for name in mine if sha256_file(folder / name) != sums[name]]
    except (OSError, ValueError, AttributeError) as e:
        return f"cannot be read ({type(e).__name__})"
    return f"{bad[0]} does not match its checksum" if bad else ""


def _verifier(name: str, position: int) -> int:
    """The rank that verifies a file of a checkpoint: of a sharded one the rank whose shard it is, else in turn."""
    shard = re.search(r"-(\d{5})-of-\d{5}\.safetensors$", name)
    return (int(shard[1]) - 1 if shard else position) % collectives.world_size()


def _copy(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes of a file."""
    with open(source, "rb") as f, open(target, "wb") as g:
        while size > 0 and (block := f.read(min(size, 1 << 20))):
            g.write(block)
            size -= len(block)


def _link(source: Path, target: Path) -> None:
    """Link a file to another name; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights: those of the model, or of its adapters."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    found = {}
    for p, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, int):  # the count of bitsandbytes' optimizers
                value = torch.tensor([value])
            if isinstance(value, torch.Tensor):
                if key in _SHARED:
                    value = value.clone()  # safetensors refuses tensors that share memory
                found[f"{names[p]}:{key}"] = value.reshape(value.shape or (1,))
    return found


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    by_name = dict(model.named_parameters())
    # torch keeps the count of updates on the CPU, but for a fused step, whose kernel reads it from the device's memory
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    targets: dict[str, Tensor] = {}
    counts: list[tuple[Any, str]] = []
    for full, (shape, dtype) in sharded_tensors.kinds(folder, "optimizer").items():
        name, _, key = full.rpartition(":")
        p = by_name[name]
        if key == "step":
            targets[full] = torch.empty(1, dtype=dtype, device=p.device if id(p) in fused else "cpu")
            optimizer.state[p][key] = targets[full].reshape(())
            counts += [] if dtype.is_floating_point else [(optimizer.state[p], full)]
        elif shape == tuple(p.shape) and dtype == p.dtype:  # also where it is sharded
            targets[full] = optimizer.state[p][key] = torch.empty_like(p, requires_grad=False)
        else:
            targets[full] = optimizer.state[p][key] = torch.empty(shape, dtype=dtype, device=p.device)
    sharded_tensors.read(folder, "optimizer", targets)
    for entries, full in counts:
        entries["step"] = int(targets[full])
