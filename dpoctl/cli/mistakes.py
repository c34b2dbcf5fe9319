"""What is said of a command line that cannot be parsed: the nearest option, whose option it is, or what it takes.

The exceptions are untyped here: their classes are in the private copy of click in typer.
"""

from dataclasses import fields
from typing import Any

from ..config.commands import COMMANDS
from ..config.schema import flag_of, spec_of
from ..errors import closest


def told(error: Any, command: str | None) -> tuple[str, str]:
    """(message, hint) of a typer exception raised while `command`, if one was named, was parsed."""
    see = f"see {' '.join(filter(None, ('dpoctl', command)))} --help"
    flag = getattr(error, "option_name", None)
    if flag is None or command not in COMMANDS:
        return error.format_message(), see
    own = {flag_of(f): spec_of(f).help for f in fields(COMMANDS[command])}
    if flag in own:  # without its value
        return error.format_message(), f"{flag}: {own[flag]}"
    others = [name for name, config in COMMANDS.items() if flag in map(flag_of, fields(config))]
    if others:
        return error.message, f"{flag} is an option of {', '.join(others)}; {see}"
    near = closest(flag, [*own, "--config", "--quiet", "--verbose", "--help"])
    return error.message, f"did you mean {near}?" if near else see
