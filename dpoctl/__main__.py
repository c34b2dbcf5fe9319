"""`dpoctl`, `python -m dpoctl`, `torchrun -m dpoctl`."""

import sys


def main() -> None:
    from .cli.app import run
    from .runtime.signals import listen

    listen()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
