"""A command of the application that runs a stage, built from its config class."""

import inspect
from typing import Any, get_type_hints

import typer

from .. import log
from ..config import schema
from ..config.commands import COMMANDS
from ..config.resolve import resolve
from .dispatch import run_stage
from .help import Command
from .options import parameters
from .pages import PAGES


def add_command(app: typer.Typer, name: str) -> None:
    """Add the command of a stage to the app."""
    config_class = COMMANDS[name]

    def call(**flags: Any) -> int:
        recipe, verbose, quiet = flags.pop("config"), flags.pop("verbose", None), flags.pop("quiet")
        log.set_verbosity(-1 if quiet else 1 if verbose else 0)
        return run_stage(name, resolve(config_class, name, _values(config_class, flags), recipe))

    call.__signature__ = inspect.Signature(parameters(config_class))  # type: ignore[attr-defined]
    app.command(name, cls=Command, help=PAGES[name].summary)(call)


def _values(config_class: type, flags: dict[str, Any]) -> dict[str, Any]:
    """What the command line gave, by field name: integers read, anything else as text, None where it gave nothing."""
    hints = get_type_hints(config_class)
    values = {name: None if value in ((), []) or value is False else value for name, value in flags.items()}
    for name, value in values.items():
        if isinstance(value, str) and schema.base_type(hints[name])[0] is int:
            try:
                values[name] = int(value)
            except ValueError:
                pass  # refused later, together with every other mistake
    return values
