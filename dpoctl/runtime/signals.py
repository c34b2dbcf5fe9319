"""SIGTERM, SIGINT, SIGUSR1: the handler sets a flag, which the work reads at its next boundary. A second ends at once."""

import signal
from typing import Any

from ..errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """`signal` is the name of the first that came, empty before."""

    def __init__(self) -> None:
        self.signal = ""

    def __call__(self, number: int, frame: Any) -> None:
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number).name


stop = Stop()


def listen() -> None:
    for number in SIGNALS:
        signal.signal(number, stop)


def at_boundary(done: str) -> None:
    """Raise Interrupted where a signal has arrived; `done` says what is complete and kept."""
    if stop.signal:
        raise Interrupted(f"stopped by {stop.signal} after {done}", hint="rerun the command to resume")
