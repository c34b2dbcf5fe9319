"""SIGTERM, SIGINT and SIGUSR1 set a flag that commands read between units of work; a second signal kills."""

import os
import signal
import time
from types import FrameType

from ..errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_FORWARDED_S = 10.0


class Stop:
    """A signal handler; `signal` is the name of the first signal that arrived, empty before.

    With `forwarded` a second signal soon after the first does not kill: a batch system that stops a job signals every
    process, and torchrun then forwards its own signal to the ranks.
    """

    def __init__(self) -> None:
        self.signal = ""
        self.forwarded = False
        self.since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal and self.forwarded and time.monotonic() - self.since < _FORWARDED_S:
            return
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal, self.since = signal.Signals(number).name, time.monotonic()


stop = Stop()


def listen() -> None:
    """Install the handler."""
    stop.forwarded = "TORCHELASTIC_RUN_ID" in os.environ
    for number in SIGNALS:
        signal.signal(number, stop)


def at_boundary(done: str) -> None:
    """Raise Interrupted where a signal has arrived; `done` says what is complete and kept."""
    if stop.signal:
        raise Interrupted(f"stopped by {stop.signal} after {done}", hint="rerun the command to resume")
