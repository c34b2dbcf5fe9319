"""A command of the application that runs a stage, built from its config class."""

import inspect
from typing import Any

import typer

from .. import log
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
        flags = {k: None if v in ((), []) or v is False else v for k, v in flags.items()}
        return run_stage(name, resolve(config_class, name, flags, recipe))

    call.__signature__ = inspect.Signature(parameters(config_class))  # type: ignore[attr-defined]
    page = PAGES[name]
    app.command(name, cls=Command, help=page.summary, rich_help_panel=page.group)(call)
