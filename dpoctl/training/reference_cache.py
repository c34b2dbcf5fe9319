"""The reference's log-probs, computed once and kept for later runs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .. import log
from ..errors import StorageError
from ..models.logprobs import Sequences, response_logps
from ..outputs import files
from ..runtime import collectives
from ..runtime.devices import Compute


class ReferenceCache:
    """Summed reference log-probs by content: a sweep over beta computes them once, and a changed file is never reused.

    `key` says what changes the numbers (weights, tokenizer, precision); the token ids are added to it. `folder` is that
    of --cache-dir; None takes the user's cache.
    """

    def __init__(self, folder: str | None, key: dict[str, Any], tokens_per_batch: int):
        self.folder = Path(folder) if folder else files.cache_home() / "reference"
        self.key, self.tokens_per_batch = key, tokens_per_batch

    def logps(self, load: Callable[[], Any], sequences: Sequences, compute: Compute) -> Tensor:
        """Log-probs [N] float32 of the sequences' responses; `load()` gives the reference where they are not cached."""
        path = self._path(sequences)
        if collectives.from_rank_0(path.exists()):
            if (cached := _read(path)) is not None and cached.shape == (len(sequences),):
                log.say(f"reference log-probs of {len(sequences)} completions: from the cache")
                return cached
            log.warn(f"{path}: damaged; computing it again")
        reference = load()
        with compute.autocast():  # every rank computes all of them: sharded ranks must forward together
            logps = response_logps(reference, sequences, tokens_per_batch=self.tokens_per_batch)
        log.say(f"reference log-probs of {len(sequences)} completions: computed")
        if collectives.rank() == 0:
            self._write(path, logps)
        return logps

    def _path(self, sequences: Sequences) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode())
        for ids, start in sequences:
            digest.update(np.array([start, len(ids), *ids], dtype=np.int64).tobytes())
        return self.folder / f"{digest.hexdigest()[:40]}.safetensors"

    def _write(self, path: Path, logps: Tensor) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, save({"logps": logps}, {"sha256": _sum(logps)}))
        except (OSError, StorageError) as e:  # a cache that cannot be written only costs time
            log.warn(f"reference log-probs are not cached for the next run ({str(e).splitlines()[0]})")


def _read(path: Path) -> Tensor | None:
    """The log-probs of a cache file; None where they are not what was written."""
    try:
        with safe_open(path, "pt") as f:
            logps, known = f.get_tensor("logps"), (f.metadata() or {}).get("sha256")
    except Exception:  # safetensors raises exceptions of several kinds
        return None
    return logps if known == _sum(logps) else None


def _sum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
