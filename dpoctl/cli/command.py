"""One command from its config: help and options from the dataclass, then claim the output and hand over to the stage."""

import importlib
import inspect
from dataclasses import MISSING, fields
from typing import Annotated, Any, Optional, get_type_hints

import typer

from .. import artifacts, launch, log, options
from ..config import COMMANDS, Frontier, Merge, Sharded, Training


def add_command(app: typer.Typer, name: str) -> None:
    """Add `name` to the app; its text is the docstring of `cli/<name>.py`."""
    module = importlib.import_module(f"dpoctl.cli.{name.replace('-', '_')}")
    config_class = COMMANDS[name]

    def call(**flags: Any) -> int:
        recipe, verbose, quiet = flags.pop("config"), flags.pop("verbose"), flags.pop("quiet")
        log.set_verbosity(-1 if quiet else 1 if verbose else 0)
        flags = {k: None if v in ((), []) or v is False else v for k, v in flags.items()}
        return run_stage(name, options.resolve(config_class, name, flags, recipe))

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
        spec = options.spec_of(f)
        kind, many = options.base_type(hints[f.name])
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
                options.flag_of(f),
                spec.help + _choices(spec),
                spec.panel,
                default,
            )
        )
    # what must be given stands first in the help
    return sorted(parameters, key=lambda p: 0 if "required" in str(p.annotation) else 1)


def _choices(spec: options.Spec) -> str:
    return f" [{'|'.join(spec.choices)}]" if spec.choices else ""


def _option(name: str, kind: Any, flag: str, help: str, panel: str, default: str) -> inspect.Parameter:
    help += " [required]" if default == "required" else f" [default: {default}]" if default else ""
    metavar = None if kind is bool else {int: "N", float: "X"}.get(kind, "TEXT")
    info = typer.Option(flag, help=help, show_default=False, metavar=metavar)
    return _parameter(name, Annotated[Optional[kind], info])  # noqa: UP045


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def run_stage(name: str, config: Any) -> int:
    """Claim the output, then run the stage; a finished work answers without loading anything."""
    if config.dry_run:
        artifacts.check_inputs(inputs_of(config))
        print("\n".join(f"{key:<22} {value}" for key, value in stage(name).plan(config).items()))
        return 0
    if launch.world_size() > 1 and isinstance(config, (Training, Sharded)):
        from . import ranks, together

        return (together if isinstance(config, Training) else ranks).run(name, config)
    if isinstance(config, Merge):
        if config.is_rows:  # claims its output as the work that the shards are of
            stage(name).join_shards(config)
            return 0
        artifacts.check_inputs(inputs_of(config))
        config = stage(name).with_base(config)
    with claim(name, config) as work:
        if work.finished:
            log.say(f"{config.out}: complete already, nothing to do")
            return 0
        stage(name).run(config, work)
    return 0


def claim(name: str, config: Any, by=artifacts.claim):
    """The claim of the command's output: a context that gives the Work."""
    identity = options.identity(config)
    return by(config.out, name, options.as_options(config), identity, inputs_of(config), overwrite=config.overwrite)


def inputs_of(config: Any) -> list[tuple[str, str, str]]:
    if isinstance(config, Merge) and config.is_rows:
        return []  # of shards that are missing, or not complete, merge knows more to say
    inputs = options.inputs(config)
    return config.frontier_inputs(inputs) if isinstance(config, Frontier) else inputs


def stage(name: str):
    return importlib.import_module(f"dpoctl.stages.{name.replace('-', '_')}")
