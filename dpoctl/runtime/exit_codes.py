"""The exit code of a rank in a file, for a job script: torchrun turns each nonzero code into 1.

Standard library only.
"""

import os
from contextlib import suppress
from pathlib import Path

_FOLDER = "DPOCTL_EXIT_CODES"


def record_exit_code(code: int, rank: str) -> None:
    """Write the code to a file named by the rank, in the folder $DPOCTL_EXIT_CODES, where that is set."""
    if folder := os.environ.get(_FOLDER):
        with suppress(OSError):  # the code itself is still the process's
            Path(folder, rank).write_text(f"{code}\n")
