"""What a command prints for a program to read."""

from typing import Any

from .files import json_line


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on one line of stdout; NaN and infinities become null."""
    print(json_line(data), end="")
