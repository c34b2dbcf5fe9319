"""One command of the application, built from its config class: options and help from the dataclass's fields."""

import importlib
import inspect
from dataclasses import MISSING, fields
from typing import Annotated, Any, Optional, get_type_hints

import typer

from .. import log
from ..config import schema
from ..config.commands import COMMANDS
from ..config.resolve import resolve
from .dispatch import run_stage


def add_command(app: typer.Typer, name: str) -> None:
    """Add `name` to the app; its text is the docstring of `cli/<name>.py`."""
    module = importlib.import_module(f"dpoctl.cli.{name.replace('-', '_')}")
    config_class = COMMANDS[name]

    def call(**flags: Any) -> int:
        recipe, verbose, quiet = flags.pop("config"), flags.pop("verbose"), flags.pop("quiet")
        log.set_verbosity(-1 if quiet else 1 if verbose else 0)
        flags = {k: None if v in ((), []) or v is False else v for k, v in flags.items()}
        return run_stage(name, resolve(config_class, name, flags, recipe))

    call.__signature__ = inspect.Signature(_parameters(config_class))
    call.__doc__ = module.__doc__
    app.command(name, rich_help_panel=None)(call)


def _parameters(config_class: type) -> list[inspect.Parameter]:
    hints = get_type_hints(config_class)
    parameters = [
        _option("config", str, "--config", "A recipe's YAML; flags go before its sections.", "Run", ""),
        _option("verbose", bool, "-v", "Say more.", "Run", ""),
        _option("quiet", bool, "-q", "Warnings and errors only.", "Run", ""),
    ]
    for f in fields(config_class):
        spec = schema.spec_of(f)
        kind, many = schema.base_type(hints[f.name])
        if spec.argument:
            kind = Optional[list[str]] if many else Optional[str]  # noqa: UP045  # absent is ours to report
            annotation = Annotated[kind, typer.Argument(help=spec.help + _choices(spec), show_default=False)]
            parameters.append(_parameter(f.name, annotation))
            continue
        default = "required" if f.default is MISSING else "" if f.default in (None, (), False) else str(f.default)
        if spec.commas:
            kind, many, default = str, False, ",".join(f"{item:g}" for item in f.default)
        parameters.append(
            _option(
                f.name,
                list[kind] if many else kind,
                schema.flag_of(f),
                spec.help + _choices(spec),
                spec.panel,
                default,
            )
        )
    # what must be given stands first in the help
    return sorted(parameters, key=lambda p: 0 if "required" in str(p.annotation) else 1)


def _choices(spec: schema.Spec) -> str:
    return f" [{'|'.join(spec.choices)}]" if spec.choices else ""


def _option(name: str, kind: Any, flag: str, help: str, panel: str, default: str) -> inspect.Parameter:
    help += " [required]" if default == "required" else f" [default: {default}]" if default else ""
    metavar = None if kind is bool else {int: "N", float: "X"}.get(kind, "TEXT")
    info = typer.Option(flag, help=help, show_default=False, metavar=metavar)
    return _parameter(name, Annotated[Optional[kind], info])  # noqa: UP045


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
