"""The command-line options of a config class: the parameters of the function that typer calls."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Optional, get_type_hints

import typer

from ..config import schema, shared
from ..config.shared import ModelOptions
from .help import LAST_PANEL, REQUIRED, SCORER_METAVAR

_FIRST_PANEL = "Data"
_UNNAMED_PANEL = "Options"  # of options that name no panel
_INPUT_METAVARS = {"file": "FILE", "model": "MODEL", "scorer": SCORER_METAVAR, schema.NAME_OR_FILE: "NAME"}
_TYPE_METAVARS = {int: "N", float: "X", str: "TEXT"}


def parameters(config_class: type) -> list[inspect.Parameter]:
    """The required arguments and options, then those of each panel in the order of `shared.PANELS`.

    `config`, `verbose` and `quiet` are added to the fields of the config class, `verbose` to commands that run a model.
    """
    hints = get_type_hints(config_class)
    found = [
        (LAST_PANEL, _flag("config", str, ("--config",), "Recipe with values of options; flags override it.", "FILE"))
    ]
    for f in sorted(fields(config_class), key=_place):
        spec = schema.spec_of(f)
        panel = REQUIRED if schema.is_required(f) else _FIRST_PANEL if spec.panel == _UNNAMED_PANEL else spec.panel
        found.append((panel, _parameter(f, hints[f.name], panel)))
    if issubclass(config_class, ModelOptions):
        found.append((LAST_PANEL, _flag("verbose", bool, ("-v", "--verbose"), "Print details.")))
    found.append((LAST_PANEL, _flag("quiet", bool, ("-q", "--quiet"), "Print warnings and errors only.")))
    order = _panel_order([panel for panel, _ in found])
    return [p for _, p in sorted(found, key=lambda entry: order.index(entry[0]))]


def _place(f: Field) -> tuple[bool, int, bool]:
    """--out comes after what is read; a panel starts with its main options, an option follows those it depends on."""
    main = shared.MAIN.index(f.name) if f.name in shared.MAIN else len(shared.MAIN)
    return f.name == "out", main, bool(schema.spec_of(f).when.help)


def _panel_order(panels: list[str]) -> list[str]:
    """Required options first, then the known panels; unknown ones come before the last."""
    known = [p for p in shared.PANELS if p != LAST_PANEL]
    return [REQUIRED, *known, *(p for p in panels if p not in (*known, LAST_PANEL)), LAST_PANEL]


def _parameter(f: Field, hint: Any, panel: str) -> inspect.Parameter:
    spec = schema.spec_of(f)
    kind, many = schema.base_type(hint)
    given = bool if kind is bool else str  # numbers are read with the recipe's, so that all mistakes are told together
    if spec.commas:
        many = False
    info: Any
    if spec.argument:
        metavar = spec.metavar or f.name.upper()
        info = typer.Argument(
            help=_help(f), show_default=False, metavar=metavar, rich_help_panel=panel, autocompletion=_complete(spec)
        )
    else:
        info = typer.Option(
            schema.flag_of(f),
            help=_help(f),
            show_default=False,
            metavar=None if kind is bool else _metavar(f, kind),
            rich_help_panel=panel,
            autocompletion=_complete(spec),
        )
    return _keyword(f.name, list[given] if many else given, info)  # type: ignore[valid-type]


def _flag(name: str, kind: type, flags: tuple[str, ...], help: str, metavar: str | None = None) -> inspect.Parameter:
    info = typer.Option(*flags, help=help, metavar=metavar, show_default=False, rich_help_panel=LAST_PANEL)
    return _keyword(name, kind, info)


def _keyword(name: str, kind: Any, info: Any) -> inspect.Parameter:
    """Absent options are None: whether one is required is checked later, together with everything else."""
    annotation = Annotated[Optional[kind], info]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(f: Field, kind: type) -> str:
    spec = schema.spec_of(f)
    if spec.metavar:
        return spec.metavar
    if spec.commas:
        return "X,..."
    return "NAME" if spec.choices else _INPUT_METAVARS.get(spec.input) or _TYPE_METAVARS[kind]


def _help(f: Field) -> str:
    """The option's help with its choices and its default, as rich markup."""
    from rich.markup import escape

    spec = schema.spec_of(f)
    notes = [spec.when.help] if spec.when.help else []
    notes += [f"choices: {', '.join(spec.choices)}"] if spec.choices else []
    if f.default is not False and f.default not in (MISSING, None, ()):
        values = f.default if isinstance(f.default, tuple) else (f.default,)
        notes.append(f"default: {','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}")
    return escape(spec.help) + "".join(f" [dim]{escape(f'[{note}]')}[/dim]" for note in notes)


def _complete(spec: schema.Spec) -> Callable[[str], list[str]] | None:
    """Shell completion of an option's choices; None leaves it to the shell, which completes file names."""
    if not spec.choices:
        return None

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in spec.choices if choice.startswith(incomplete)]

    return complete
