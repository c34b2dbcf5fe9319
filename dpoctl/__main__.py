"""`dpoctl`, `python -m dpoctl`, `torchrun -m dpoctl`."""

import os
import sys


def main() -> None:
    from .cli.app import run
    from .runtime.exit_codes import record_exit_code
    from .runtime.rendezvous import exit_without_teardown
    from .runtime.signals import listen

    rank = os.environ.get("RANK", "0")  # commands that write rows remove it
    listen()
    try:
        code = run(sys.argv[1:])
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    record_exit_code(code, rank)
    exit_without_teardown(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
