"""Which of torchrun's processes this is, and what rank 0 broadcasts to the others before a process group exists.

Rank 0 alone claims the output. Whether the run starts, resumes or is refused, the others learn through torchrun's own
store. Only the standard library is imported until then.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from ..errors import DpoctlError, RankLost

BEATS = "dpoctl/beats"  # raised by ranks that others wait for, see long_work.py
_MESSAGE, _RECEIVED = "dpoctl/message", "dpoctl/received"
_SLICE_S = 1.0
_store: Any = None
_opening = threading.Lock()
_joined_minutes: float | None = None
_is_blocked = False  # a thread waits for a store that does not answer
_broadcasts = 0  # by this process: each message has the number of one


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def store(minutes: float) -> Any:
    """The store that all ranks of this start share."""
    global _store
    with _opening:
        if _store is None:
            import torch.distributed as dist

            _store = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=minutes))))[0]
    return _store


def joined(minutes: float | None) -> None:
    """Record that this rank has joined the process group with --rank-timeout `minutes`, or (None) has left it."""
    global _joined_minutes
    _joined_minutes = minutes


def joined_minutes() -> float | None:
    """--rank-timeout of the process group; None outside one."""
    return _joined_minutes


def wait(key: str, minutes: float, failed: str | None = None) -> None:
    """Wait until another rank sets `key` in the store.

    Raises RankLost where a rank sets `failed`, and where for `minutes` no rank at work has shown that it lives.
    """
    global _is_blocked
    waiting = _Waiting(minutes, key, failed)
    # Neither connecting to a frozen host of the store nor a request to it ever returns.
    thread = threading.Thread(target=waiting.run, daemon=True)
    thread.start()
    while not waiting.done.wait(max(0.0, waiting.seen + 60 * minutes - time.monotonic())):
        if time.monotonic() >= waiting.seen + 60 * minutes:
            _is_blocked = True
            raise lost(RuntimeError(f"no sign of life while waiting for {key}"), minutes)
    if waiting.error:
        raise lost(waiting.error, minutes)


class _Waiting:
    """Requests to the store until `key` or `failed` is set. `seen` is when a rank at work last showed that it lives."""

    def __init__(self, minutes: float, key: str, failed: str | None):
        self.minutes, self.key, self.failed = minutes, key, failed
        self.seen, self.done = time.monotonic(), threading.Event()
        self.error: RuntimeError | None = None

    def run(self) -> None:
        try:
            self._wait()
        except RuntimeError as e:
            self.error = e
        self.done.set()

    def _wait(self) -> None:
        shared, beats = store(self.minutes), None
        each = timedelta(seconds=min(_SLICE_S, 60 * self.minutes / 4))
        while True:
            try:
                shared.wait([self.key], each)
                return
            except RuntimeError as e:
                if type(e).__name__ != "DistStoreError":  # not the time-out of this request
                    raise
            if self.failed and shared.check([self.failed]):
                raise RuntimeError(f"rank {shared.get(self.failed).decode()} failed")
            now = shared.add(BEATS, 0)
            if beats not in (None, now):
                self.seen = time.monotonic()
            beats = now


def broadcast_refusal(error: DpoctlError, minutes: float) -> None:
    """From rank 0: the run is refused. The others end with the same exit code; wait until they have read it."""
    _broadcast({"refused": error.message, "hint": error.hint, "code": error.exit_code}, minutes)
    received = [f"{_RECEIVED}/{_broadcasts}/{other}" for other in range(1, world_size())]
    try:
        store(minutes).wait(received, timedelta(minutes=min(minutes, 1.0)))
    except RuntimeError:
        pass  # a rank that is not there has nothing to read


def broadcast_start(resuming: bool, minutes: float) -> bool:
    """Wait until rank 0 starts the run; returns whether it resumes an earlier one.

    `resuming` is what rank 0 found. Raises rank 0's refusal with its exit code, RankLost where rank 0 does not answer.
    """
    global _broadcasts
    if rank() == 0:
        _broadcast({"resuming": resuming}, minutes)
        return resuming
    _broadcasts += 1
    wait(f"{_MESSAGE}/{_broadcasts}", minutes)
    message = json.loads(store(minutes).get(f"{_MESSAGE}/{_broadcasts}"))
    store(minutes).set(f"{_RECEIVED}/{_broadcasts}/{rank()}", "")
    if "refused" in message:
        error = DpoctlError(message["refused"], message["hint"])
        error.exit_code = message["code"]
        raise error
    return message["resuming"]


def broadcasts() -> int:
    """How many messages rank 0 has sent. Until the first one, the other ranks find mistakes themselves."""
    return _broadcasts


def _broadcast(message: dict[str, Any], minutes: float) -> None:
    global _broadcasts
    _broadcasts += 1
    store(minutes).set(f"{_MESSAGE}/{_broadcasts}", json.dumps(message))


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another rank died or hangs."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed by peer" in str(error))
    )


def lost(error: BaseException, minutes: float) -> RankLost:
    """The exception to raise then; the run can be resumed from its last checkpoint or from its start."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RankLost(
        f"rank {rank()}: another rank died, or did not answer for {minutes:g} minutes (--rank-timeout): {reason[:200]}",
        hint="see that rank's log; rerun the command to resume from the last checkpoint",
    )


def exit_without_teardown(code: int) -> None:
    """End the process at once where it still belongs to a process group, or waits for a store; else return.

    A command that fails or is stopped leaves its group connected. When the interpreter then takes the group down while
    the other ranks end, gloo's threads can abort the process (exit 134 in place of 75), and NCCL can wait for ever.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_initialized() or _is_blocked):
        return
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass  # nobody reads it any more
    os._exit(code)
