"""`dpoctl`, `python -m dpoctl`, `torchrun -m dpoctl`."""

import signal
import sys


def main() -> None:
    from .cli.app import run

    # Row outputs are whole at any instant, so they stop where they are; training puts its own handlers in place.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    sys.exit(run(sys.argv[1:]))


def _stop(number: int, frame) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    main()
