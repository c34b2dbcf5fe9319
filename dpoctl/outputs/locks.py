"""Locks on files, so that one process at a time writes an output. Standard library only."""

import errno
import fcntl
import os
import time

from .. import log
from ..errors import Interrupted, OutputInUse
from ..runtime import signals

_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # EACCES: where flock is made of a lock of fcntl's
_WAIT_S, _EVERY_S = 180.0, 1.0
_warned = False


def lock(fd: int, path: str, instead: str) -> None:
    """Lock an open file until it is closed, or until the process ends, however it ends.

    `path` names the output, `instead` what to choose in its place. Raises OutputInUse where another process holds the
    lock. On a network file system the lock of a node that has died may stand for some time: a job that Slurm has
    requeued waits for it, up to three minutes. A file system without locks is warned of once.
    """
    end = time.monotonic() + (_WAIT_S if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else 0)
    waiting = False
    while not _locked(fd, path):
        if time.monotonic() >= end:
            raise OutputInUse(
                f"{path}: another dpoctl process is writing it", hint=f"wait for it, or choose another {instead}"
            )
        if not waiting:
            log.say(f"{path}: still locked, perhaps by a node that died; waiting up to {_WAIT_S / 60:g} minutes")
            waiting = True
        if signals.stop.signal:
            raise Interrupted(f"stopped by {signals.stop.signal} before the start", hint="rerun the command")
        time.sleep(_EVERY_S)


def _locked(fd: int, path: str) -> bool:
    """Whether the lock was taken, or there are no locks here."""
    global _warned
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in _HELD:
            return False
        if not _warned:
            _warned = True
            log.warn(
                f"{path}: its file system has no locks ({os.strerror(e.errno or 0)}), "
                "so dpoctl cannot see whether another process writes the same output"
            )
    return True
