"""The exceptions that a user can meet, each with its exit code.

Everything else that escapes a command is a fault of dpoctl's own and exits 1 with a traceback.
"""

import difflib


class DpoctlError(Exception):
    """Base of all: a message of one or two lines and, where there is something to do about it, a hint."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(DpoctlError):
    """The input is at fault: an option, a file, a row, a model. Nothing was written."""

    exit_code = 2


class StorageError(DpoctlError):
    """An output cannot be written: no room, or no permission. What stood before, stands."""

    exit_code = 2


class NumericalError(DpoctlError):
    """The numbers went wrong (a non-finite loss, a runaway KL). The last good checkpoint is kept."""

    exit_code = 3


class Interrupted(DpoctlError):
    """Stopped on request with the state saved: the same command again continues."""

    exit_code = 75


class RankLost(Interrupted):
    """Another process of the run died or hangs: the same command again continues."""


def closest(name: str, names) -> str:
    """The known name nearest to what was given, for a hint; empty where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return near[0] if near else ""
