"""Inputs that can be read only once, such as /dev/stdin and process substitutions: copied to a temporary file.

A command reads its inputs several times (their content is hashed, rows are counted), so a pipe is copied the first time
that it is asked for, and the copy is removed when the process ends. Standard library only.
"""

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import InputError

_copies: dict[str, Path] = {}  # by the path that the user gave


def is_pipe(path: str | os.PathLike) -> bool:
    """Whether a path exists and is neither a regular file nor a directory."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def readable(path: str | os.PathLike) -> Path:
    """The path itself, or of a pipe the file that holds what came through it.

    Raises InputError for a terminal, for a pipe under torchrun, whose processes cannot all read it, and for what cannot
    be copied.
    """
    name = os.fspath(path)
    if name in _copies:
        return _copies[name]
    if not is_pipe(name):
        return Path(name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"{name}: a pipe can be read by one process only", hint="write its content to a file and give that"
        )
    _copies[name] = _copied(name)
    return _copies[name]


def _copied(name: str) -> Path:
    fd, copy = tempfile.mkstemp(prefix="dpoctl-pipe-")
    atexit.register(_remove, copy)
    try:
        with open(name, "rb") as source, os.fdopen(fd, "wb") as target:
            if source.isatty():
                raise InputError(f"{name}: is a terminal", hint="pipe the rows in, or name a file")
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise InputError(f"{name}: cannot be read as a file: {error.strerror or error}") from None
    return Path(copy)


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
