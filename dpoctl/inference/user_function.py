"""A function of the user's in a Python file, and where in that file an error came from."""

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError


def imported(file: str, path: Path, name: str) -> Callable[[list[dict]], Any]:
    """The function `name` of a Python file. Raises InputError."""
    spec = importlib.util.spec_from_file_location(f"dpoctl_scorer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"scorer {file}: not a Python file", "its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise InputError(f"scorer {file}: it cannot be imported: {location(e, path)}") from e
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise InputError(f"scorer {file}: it has no function {name}", f"it has: {', '.join(defined) or 'none'}")
    return function


def location(error: Exception, path: Path) -> str:
    """The last line of the file that took part in an error, and the error's first line."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    at = f"line {lines[-1]}: " if lines else ""
    return f"{at}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
