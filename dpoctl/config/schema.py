"""How an option is declared: a field of a config dataclass with its help, panel, checks and condition.

An option that nothing reads does not exist, and one that the other options make meaningless is refused: `when` says
under which conditions an option is read. Standard library only.
"""

import os
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from .conditions import ALWAYS, When
from .scorer import parse_scorer

NAME_OR_FILE = "name or file"  # an option that is one of some names, or a file of the user's


@dataclass(frozen=True)
class Spec:
    """What is known of an option besides its name, type and default."""

    help: str
    panel: str
    choices: tuple[str, ...] = ()
    synonyms: dict[str, str] = field(default_factory=dict)  # what users write in place of a choice: what to tell them
    summed: Callable[[str], str] | None = None  # of choices that may be summed: the normal form; raises ValueError
    words: tuple[str, ...] = ()  # of a number: what may be given in its place
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    identity: bool = True  # part of what the output is: may not change when a run is resumed
    input: str = ""  # "file", "model", "scorer" or "name or file": the output depends on the content behind it
    input_when: When = ALWAYS  # the condition under which it is one; else its text counts
    argument: bool = False  # positional on the command line
    flag: str = ""  # the flag, where it is not the field's name
    commas: bool = False  # a list given as one text with commas
    several: bool = False  # may be given several times; one value is recorded as itself, none as null
    metavar: str = ""  # what the help calls the value, where type and `input` do not say it
    when: When = ALWAYS  # the condition under which the option is read


def option(default: Any = MISSING, help: str = "", panel: str = "Options", **spec: Any) -> Any:
    """A dataclass field that is a command-line option; without a default it is required."""
    metadata = {"spec": Spec(help=help, panel=panel, **spec)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def like(cls: type, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """A dataclass field that is another class's option, with another default or changes of what is known of it."""
    known = cls.__dict__["__dataclass_fields__"][name]
    default = known.default if default is MISSING else default
    return field(default=default, metadata={"spec": replace(spec_of(known), **changes)})


def amended(**specs: dict[str, Any]) -> Callable[[type], type]:
    """A class decorator that changes what is known of inherited options: `amended(top_p={"when": given("model")})`."""

    def amend(cls: type) -> type:
        known = cls.__dict__["__dataclass_fields__"]
        for name, changes in specs.items():
            changed = copy(known[name])
            changed.metadata = MappingProxyType({"spec": replace(spec_of(changed), **changes)})
            known[name] = changed
        return cls

    return amend


def field_of(config: Any, name: str) -> Field:
    return next(f for f in fields(config) if f.name == name)


def spec_of(f: Field) -> Spec:
    return f.metadata["spec"]


def flag_of(f: Field) -> str:
    return spec_of(f).flag or "--" + f.name.replace("_", "-")


def flag_named(config: Any, name: str) -> str:
    """The flag of an option by its field's name, for a message: commands may call the same option differently."""
    return flag_of(field_of(config, name))


def key_of(f: Field) -> str:
    """The option's name in a recipe and in messages: the flag without its dashes."""
    return f.name.replace("_", "-") if spec_of(f).argument else flag_of(f).removeprefix("--")


def is_required(f: Field) -> bool:
    return f.default is MISSING


def base_type(hint: Any) -> tuple[type, bool]:
    """(element type, is it a list) of a field's type hint such as `int | None` or `tuple[str, ...]`."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(h for h in get_args(hint) if h is not NoneType)
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def is_read(config: Any, f: Field) -> bool:
    """Whether the command reads the option, given the other options."""
    return spec_of(f).when.holds(config)


def as_options(config: Any) -> dict[str, Any]:
    """Every option of a config by its recipe name, as the manifest and config.yaml hold them."""
    return {key_of(f): _recorded(spec_of(f), getattr(config, f.name)) for f in fields(config)}


def identity(config: Any) -> dict[str, Any]:
    """The options that say what the output is: those that are read, of an input only what its content does not say."""
    result = {}
    for f in fields(config):
        spec, value = spec_of(f), _plain(getattr(config, f.name))
        if not spec.identity or not is_read(config, f):
            continue
        if spec.input == "scorer" and isinstance(value, str):
            value = parse_scorer(value).variant
        elif spec.input and spec.input != NAME_OR_FILE and spec.input_when.holds(config):
            value = None if value is None else len(value) if isinstance(value, list) else 1
        result[key_of(f)] = value
    return result


def inputs(config: Any) -> list[tuple[str, str, str]]:
    """(name, kind, path) of every input that the command reads; a scorer may name several paths.

    Those that no option names are the config's `further_inputs`.
    """
    found = []
    for f in fields(config):
        spec, value = spec_of(f), getattr(config, f.name)
        if not spec.input or value in (None, ()) or not (is_read(config, f) and spec.input_when.holds(config)):
            continue
        if spec.input == NAME_OR_FILE and not os.path.isfile(value):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if spec.input == "scorer":
                found += [(key_of(f), kind, path) for kind, path in parse_scorer(item).inputs]
            else:
                found.append((key_of(f), spec.input, item))
    return found + (config.further_inputs() if hasattr(config, "further_inputs") else [])


def _recorded(spec: Spec, value: Any) -> Any:
    if spec.several and isinstance(value, tuple) and len(value) < 2:
        return value[0] if value else None
    return _plain(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
