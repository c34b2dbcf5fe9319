"""The exceptions whose message a user sees, each with its exit code.

1   internal error: any other exception that escapes a command, shown with its traceback
2   invalid input or missing resources: options, files, rows, models; a full disk, no permission, out of memory
3   numerical failure: a non-finite loss, a KL out of bounds
75  stopped with the state saved, or another process is writing the output; rerunning the command resumes
"""

import difflib
from collections.abc import Iterable


class DpoctlError(Exception):
    """Base class: a message of one or two lines and, where the user can do something about it, a hint."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(DpoctlError):
    """Invalid input: an option, a file, a row, a model, a server's reply. What was written before it is kept."""

    exit_code = 2


class StorageError(DpoctlError):
    """An output cannot be written: the disk is full, or permission is missing. What was complete before is kept."""

    exit_code = 2


class NumericalError(DpoctlError):
    """A numerical failure: a non-finite loss, a KL out of bounds. The last good checkpoint is kept."""

    exit_code = 3


class Interrupted(DpoctlError):
    """Stopped on request with the state saved; rerunning the command resumes."""

    exit_code = 75


class OutputInUse(DpoctlError):
    """Another process is writing the output; rerunning the command resumes or finds it complete."""

    exit_code = 75


class RankLost(Interrupted):
    """Another process of the run died or does not respond; rerunning the command resumes."""


def closest(name: str, names: Iterable[str]) -> str:
    """The known name most similar to `name`, for a hint; empty where none is similar."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return near[0] if near else ""
