"""SIGTERM, SIGINT and SIGUSR1 set a flag that commands read between units of work; a second signal kills."""

import signal
from types import FrameType

from ..errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """A signal handler; `signal` is the name of the first signal that arrived, empty before."""

    def __init__(self) -> None:
        self.signal = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number).name


stop = Stop()


def listen() -> None:
    """Install the handler."""
    for number in SIGNALS:
        signal.signal(number, stop)


def at_boundary(done: str) -> None:
    """Raise Interrupted where a signal has arrived; `done` says what is complete and kept."""
    if stop.signal:
        raise Interrupted(f"stopped by {stop.signal} after {done}", hint="rerun the command to resume")
