"""`dpoctl`, `python -m dpoctl`, `torchrun -m dpoctl`."""

import sys


def main() -> None:
    from .cli.app import run
    from .runtime.rendezvous import exit_without_teardown
    from .runtime.signals import listen

    listen()
    try:
        code = run(sys.argv[1:])
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    exit_without_teardown(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
