"""The processes that torchrun starts for one run: which of them this is, and rank 0's word to the others.

Rank 0 alone claims the output. What it found (go on, or refused) the others hear over torchrun's own store, before any
process group exists. Nothing is imported here beside the standard library until ranks meet.
"""

import json
import os
from datetime import timedelta
from typing import Any

from ..errors import DpoctlError, RankLost

_WORD, _HEARD = "dpoctl/word", "dpoctl/heard"
_store: Any = None
_broadcasts = 0  # of this process: a word is for one of them


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def store(minutes: float):
    """The store that all ranks of this start share."""
    global _store
    if _store is None:
        import torch.distributed as dist

        _store = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=minutes))))[0]
    return _store


def broadcast_refusal(error: DpoctlError, minutes: float) -> None:
    """Rank 0 cannot go on: let the others end with its exit code, and wait until they know."""
    _say({"refused": error.message, "hint": error.hint, "code": error.exit_code}, minutes)
    heard = [f"{_HEARD}/{_broadcasts}/{other}" for other in range(1, world_size())]
    try:
        store(minutes).wait(heard, timedelta(minutes=min(minutes, 1.0)))
    except RuntimeError:
        pass  # a rank that is not there needs no telling


def broadcast_start(resuming: bool, minutes: float) -> bool:
    """Wait for rank 0's word that the run goes on, and return whether it continues one that was begun.

    `resuming` is what rank 0 found. Raises rank 0's refusal with its exit code, RankLost where rank 0 stays away.
    """
    global _broadcasts
    if rank() == 0:
        _say({"resuming": resuming}, minutes)
        return resuming
    _broadcasts += 1
    try:
        store(minutes).wait([f"{_WORD}/{_broadcasts}"], timedelta(minutes=minutes))
    except RuntimeError as e:
        raise lost(e, minutes) from None
    word = json.loads(store(minutes).get(f"{_WORD}/{_broadcasts}"))
    store(minutes).set(f"{_HEARD}/{_broadcasts}/{rank()}", "")
    if "refused" in word:
        error = DpoctlError(word["refused"], word["hint"])
        error.exit_code = word["code"]
        raise error
    return word["resuming"]


def broadcasts() -> int:
    """How often ranks have met: where rank 0 was not refused before, the others see for themselves."""
    return _broadcasts


def _say(word: dict[str, Any], minutes: float) -> None:
    global _broadcasts
    _broadcasts += 1
    store(minutes).set(f"{_WORD}/{_broadcasts}", json.dumps(word))


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another rank does not answer any more: it died, or it hangs."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed by peer" in str(error))
    )


def lost(error: BaseException, minutes: float) -> RankLost:
    """What to raise then: the work can be continued, from its last checkpoint or from its start."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RankLost(
        f"rank {rank()}: another rank has died, or has not answered for {minutes:g} minutes (--rank-timeout): {reason[:200]}",
        hint="see what that rank said; the same command again continues from the last checkpoint",
    )
