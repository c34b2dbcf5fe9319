"""The reference's log-probs, computed once and kept for later runs.

The ranks share the micro-batches. What is computed is saved every few minutes, and when a signal stops the run, so that
the rerun command goes on from there, on any number of ranks.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .. import log
from ..data.gaps import gaps_of
from ..errors import StorageError
from ..models.logprobs import SHORTEST, Sequences, micro_batches, summed_logps
from ..outputs import files
from ..runtime import collectives, sharing, signals
from ..runtime.devices import Compute

SAVE_EVERY_S = 180.0


class ReferenceCache:
    """Summed reference log-probs by content: a sweep over beta computes them once, and a changed file is never reused.

    `key` says what changes the numbers (weights, tokenizer, precision, sharding); the token ids are added to it.
    `folder` is that of --cache-dir; None takes the user's cache. Rank 0 alone reads and writes it.
    """

    def __init__(self, folder: str | None, key: dict[str, Any], tokens_per_batch: int):
        self.folder = Path(folder) if folder else files.cache_home() / "reference"
        self.key, self.tokens_per_batch = key, tokens_per_batch
        self.can_write = True

    def logps(self, load: Callable[[], Any], sequences: Sequences, compute: Compute) -> Tensor:
        """Log-probs [N] float32 of the sequences' responses; `load()` gives the reference where they are not cached.

        Raises Interrupted, on every rank, between two micro-batches where a signal has arrived on any.
        """
        path, n = self._path(sequences), len(sequences)
        known = collectives.from_rank_0(self._known(path, n) if collectives.rank() == 0 else None)
        if known.done.all():
            log.say(f"reference log-probs of {n} completions: from the cache")
            return known.logps
        if known.done.any():
            log.say(f"reference log-probs: resuming after {int(known.done.sum())} of {n} completions")
        self._compute(path, load(), sequences, known, compute)
        log.say(f"reference log-probs of {n} completions: computed")
        if collectives.rank() == 0:
            self._write(path, {"logps": known.logps})
            with suppress(OSError):
                _partial(path).unlink()
        return known.logps

    @torch.no_grad()
    def _compute(self, path: Path, reference: Any, sequences: Sequences, known: "_Known", compute: Compute) -> None:
        """Complete `known`. The micro-batches depend neither on what is known nor on the number of ranks."""
        groups = list(micro_batches(sequences, self.tokens_per_batch))
        left = [group for group in groups if not known.done[group].all()]
        rounds = sharing.in_rounds(reference, left, lambda: summed_logps(reference, SHORTEST))
        world, total = collectives.world_size(), len(sequences)
        found: list[tuple[list[int], Tensor]] = []  # since the last merge, on the device: the host waits for it there
        saved = time.monotonic()
        with compute.autocast(), log.progress("reference", total, "completions", int(known.done.sum())) as meter:
            for n, group in enumerate(rounds):
                if group is not None:
                    found.append((group, summed_logps(reference, [sequences[i] for i in group]).float()))
                meter.advance(sum(map(len, left[n * world : (n + 1) * world])))
                stop, due = _on_any_rank(bool(signals.stop.signal), time.monotonic() - saved > SAVE_EVERY_S)
                last = (n + 1) * world >= len(left)
                if stop or due or last:
                    known.add(collectives.sum_over_ranks(_rows_of(found, total)))
                    found = []
                if (stop or due) and not last:
                    if collectives.rank() == 0:
                        self._write(_partial(path), known._asdict())
                    saved = time.monotonic()
                if stop and not last:
                    kept = "which are kept" if self.can_write else "which could not be kept"
                    raise sharing.stopped(f"{int(known.done.sum())} of {total} reference log-probs, {kept}")

    def _known(self, path: Path, n: int) -> "_Known":
        """What the cache has: all log-probs, those of a stopped run, or none."""
        for file in (path, _partial(path)):
            if not file.exists():
                continue
            found = _read(file)
            if found is not None and found["logps"].shape == (n,):
                return _Known(found["logps"], found.get("done", torch.ones(n, dtype=torch.bool)))
            log.warn(f"{file}: damaged; computing it again")
        return _Known(torch.zeros(n), torch.zeros(n, dtype=torch.bool))

    def _path(self, sequences: Sequences) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode())
        for sequence in sequences:
            ids, start = sequence
            edges = [edge for gap in gaps_of(sequence) for edge in gap]
            digest.update(np.array([start, len(ids), *ids, *edges], dtype=np.int64).tobytes())
        return self.folder / f"{digest.hexdigest()[:40]}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, save(tensors, {"sha256": _sum(tensors)}))
        except (OSError, StorageError) as e:  # a cache that cannot be written only costs time
            if self.can_write:
                log.warn(f"reference log-probs are not cached for the next run ({str(e).splitlines()[0]})")
            self.can_write = False


class _Known(NamedTuple):
    """Log-probs [N], of which those are known that are `done` [N] bool."""

    logps: Tensor
    done: Tensor

    def add(self, fresh: Tensor) -> None:
        """Add new log-probs: [2, N], of which the second row is 1 where there is one."""
        new = fresh[1] > 0
        self.logps[new] = fresh[0, new]
        self.done[new] = True


def _rows_of(found: list[tuple[list[int], Tensor]], total: int) -> Tensor:
    """[2, N]: this rank's new log-probs, and 1 for each of them."""
    fresh = torch.zeros(2, total)
    for group, logps in found:
        fresh[0, group] = logps.cpu()
        fresh[1, group] = 1.0
    return fresh


def _on_any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank."""
    return collectives.reduce_over_ranks(torch.tensor(flags, dtype=torch.int8), "max").bool().tolist()


def _partial(path: Path) -> Path:
    """The file of log-probs that are not complete yet."""
    return path.with_name(path.name + ".partial")


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a cache file; None where they are not what was written."""
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in ("logps", "done") if name in f.keys()}
            known = (f.metadata() or {}).get("sha256")
    except Exception:  # safetensors raises exceptions of several kinds
        return None
    return tensors if "logps" in tensors and known == _sum(tensors) else None


def _sum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(tensors["logps"].contiguous().numpy().tobytes())
    if "done" in tensors:
        digest.update(tensors["done"].numpy().tobytes())
    return digest.hexdigest()
