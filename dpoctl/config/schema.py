"""How an option is declared: a field of a config dataclass with its help, panel and checks. Standard library only."""

import os
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

NAME_OR_FILE = "name or file"  # an option that is one of some names, or a file of the user's own


@dataclass(frozen=True)
class Spec:
    """What is known of an option beside its name, type and default."""

    help: str
    panel: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    identity: bool = True  # part of what the work is: may not change when a run is continued
    input: str = ""  # "file", "model", "scorer" or "name or file": the work depends on the content behind it
    argument: bool = False  # positional on the command line
    flag: str = ""  # the flag, where it is not the field's name
    commas: bool = False  # a list given as one text with commas
    metavar: str = ""  # what the help calls the value, where type and `input` do not say it


def option(default: Any = MISSING, help: str = "", panel: str = "Options", **spec: Any) -> Any:
    """A dataclass field that is a command-line option; without a default it is required."""
    metadata = {"spec": Spec(help=help, panel=panel, **spec)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def spec_of(f) -> Spec:
    return f.metadata["spec"]


def flag_of(f) -> str:
    return spec_of(f).flag or "--" + f.name.replace("_", "-")


def key_of(f) -> str:
    """The option's name in a recipe and in messages: the flag without its dashes."""
    return f.name.replace("_", "-") if spec_of(f).argument else flag_of(f).removeprefix("--")


def is_required(f) -> bool:
    return f.default is MISSING


def base_type(hint: Any) -> tuple[type, bool]:
    """(element type, is it a list) of a field's type hint such as `int | None` or `tuple[str, ...]`."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(h for h in get_args(hint) if h is not NoneType)
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def as_options(config: Any) -> dict[str, Any]:
    """Every option of a config by its recipe name, as the manifest and config.yaml hold them."""
    return {key_of(f): _plain(getattr(config, f.name)) for f in fields(config)}


def identity(config: Any) -> dict[str, Any]:
    """The options that say what the work is; of an input only what its content does not say."""
    result = {}
    for f in fields(config):
        spec, value = spec_of(f), _plain(getattr(config, f.name))
        if not spec.identity:
            continue
        if spec.input == "scorer" and isinstance(value, str):
            head, _, score_type = value.rpartition("@")
            value = f"@{score_type}" if head else value.rsplit(":", 1)[-1] if value.startswith("python:") else ""
        elif spec.input and spec.input != NAME_OR_FILE:
            value = None if value is None else len(value) if isinstance(value, list) else 1
        result[key_of(f)] = value
    return result


def inputs(config: Any) -> list[tuple[str, str, str]]:
    """(name, kind, path) of every input the config names; a scorer may name several paths."""
    found = []
    for f in fields(config):
        spec, value = spec_of(f), getattr(config, f.name)
        if not spec.input or value in (None, ()) or (spec.input == NAME_OR_FILE and not os.path.isfile(value)):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            paths = scorer_paths(item) if spec.input == "scorer" else [item]
            found.extend((key_of(f), "model" if spec.input == "scorer" else spec.input, path) for path in paths)
    return found


def scorer_paths(spec: str) -> list[str]:
    """The files and models that a SCORER names."""
    if spec.startswith("python:"):
        return [spec.removeprefix("python:").rpartition(":")[0]]
    if spec.startswith("implicit:"):
        return spec.removeprefix("implicit:").split(",")
    head, _, score_type = spec.rpartition("@")
    return [head if score_type in ("prob", "logit", "log-odds") and head else spec]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
