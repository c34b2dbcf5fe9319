"""How options are declared and resolved: a flag beats the recipe's section, the section beats `defaults:`.

An option lives in one place, a field of a dataclass in `config.py`; this module gives the field its check, finds its
value, and reports every problem at once, each with file, line and field. Standard library and yaml only.
"""

import os
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import InputError, closest

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


def resolve(cls: type, command: str, flags: dict[str, Any], recipe: str | None) -> Any:
    """The config of `command`: `flags` holds what the command line gave, by field name.

    Raises InputError that lists every unknown key, wrong type, value out of range, missing option and impossible
    combination together.
    """
    problems: list[str] = []
    values = _recipe_values(cls, command, recipe, problems) if recipe else {}
    values.update(
        {name: (value, flag_of(f)) for f in fields(cls) for name in [f.name] if (value := flags.get(name)) is not None}
    )
    _apply_preset(cls, values, problems)
    hints = get_type_hints(cls)
    resolved: dict[str, Any] = {}
    for f in fields(cls):
        if f.name in values:
            value, where = values[f.name]
            problem, resolved[f.name] = _check(value, hints[f.name], spec_of(f))
            if problem:
                problems.append(f"{where}: {problem}")
        elif is_required(f):
            name = key_of(f).upper() if spec_of(f).argument else flag_of(f)
            problems.append(f"{name} is required ({spec_of(f).help.rstrip('.')})")
    if not problems:
        config = cls(**resolved)
        problems.extend(config.problems())
    if problems:
        raise InputError("\n       ".join(problems), hint=f"see dpoctl {command} --help")
    return config


def _apply_preset(cls: type, values: dict[str, tuple[Any, str]], problems: list[str]) -> None:
    """Add what the chosen preset sets; what was given beside it must agree, but for what the preset leaves open."""
    name = values.get("preset", (None, ""))[0]
    by_name, hints = {f.name: f for f in fields(cls)}, get_type_hints(cls)
    for key, value in getattr(cls, "PRESETS", {}).get(name, {}).items():
        if key not in values:
            values[key] = (value, f"--preset {name}")
        elif key not in cls.PRESET_OPEN:
            given, where = values[key]
            if _check(given, hints[key], spec_of(by_name[key]))[1] != value:
                problems.append(f"{where}: {given} contradicts --preset {name}, which sets {value}")


def _recipe_values(cls: type, command: str, recipe: str, problems: list[str]) -> dict[str, tuple[Any, str]]:
    """Field name -> (value, where it stands) from the recipe's `defaults:` and the command's own section."""
    from . import config as known

    document = _load_yaml(recipe)
    own = {key_of(f): f.name for f in fields(cls)}
    values: dict[str, tuple[Any, str]] = {}
    for section, line in document["lines"].items():
        if section not in (*known.COMMANDS, "defaults"):
            near = closest(section, (*known.COMMANDS, "defaults"))
            problems.append(
                f"{recipe}:{line}: {section}: no such section" + (f" (did you mean {near}?)" if near else "")
            )
    every = {key_of(f) for c in known.COMMANDS.values() for f in fields(c)}
    for section in ("defaults", command):
        for key, (value, line) in document["sections"].get(section, {}).items():
            where = f"{recipe}:{line}: {section}.{key}"
            if key in own:
                values[own[key]] = (value, where)
            elif section == command or key not in every:  # a default may be meant for other commands
                near = closest(key, own if section == command else every)
                problems.append(f"{where}: no such option" + (f" (did you mean {near}?)" if near else ""))
    return values


def _load_yaml(path: str) -> dict[str, Any]:
    """{"lines": section -> line, "sections": section -> key -> (value, line)} of a recipe."""
    import yaml

    try:
        with open(path, encoding="utf-8") as f:
            root = yaml.compose(f, Loader=yaml.SafeLoader)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})", hint="--config takes a recipe's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise InputError(f"{where}: not YAML ({getattr(e, 'problem', None) or e})") from None
    result: dict[str, Any] = {"lines": {}, "sections": {}}
    if root is None:
        return result
    _expect_mapping(path, root, "a recipe is a mapping of sections")
    for key, node in root.value:
        result["lines"][key.value] = key.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode) and not node.value:
            continue
        _expect_mapping(path, node, f"section {key.value} is a mapping of options")
        constructor = yaml.SafeLoader("")
        result["sections"][key.value] = {
            k.value: (constructor.construct_object(v, deep=True), k.start_mark.line + 1) for k, v in node.value
        }
    return result


def _expect_mapping(path: str, node, what: str) -> None:
    if node.id != "mapping":
        raise InputError(
            f"{path}:{node.start_mark.line + 1}: {what}", hint="for example: 'train-dpo:' then '  beta: 0.1'"
        )


def _check(value: Any, hint: Any, spec: Spec) -> tuple[str, Any]:
    """(problem or "", the value in its type)."""
    kind, many = base_type(hint)
    if value is None:
        return ("", None) if NoneType in get_args(hint) else (f"expected {_kind(kind)}, got nothing", None)
    if many:
        if spec.commas and isinstance(value, str):
            value = [_number_or_text(item.strip()) for item in value.split(",")]
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        checked = [_check_one(v, kind, spec) for v in items]
        return next((p for p, _ in checked if p), ""), tuple(v for _, v in checked)
    return _check_one(value, kind, spec)


def _number_or_text(item: str) -> float | str:
    try:
        return float(item)
    except ValueError:
        return item


def _kind(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def _check_one(value: Any, kind: type, spec: Spec) -> tuple[str, Any]:
    if kind is float and isinstance(value, str):  # YAML reads 1e-6 as a text
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        return f"expected {_kind(kind)}, got {value!r}", value
    if spec.choices and value not in spec.choices:
        near = closest(value, spec.choices)
        return f"{value!r} is none of {', '.join(spec.choices)}" + (f" (did you mean {near}?)" if near else ""), value
    if kind in (int, float):
        if value != value:
            return "expected a number, got nan", value
        if spec.at_least is not None and value < spec.at_least:
            return f"expected at least {spec.at_least:g}, got {value:g}", value
        if spec.above is not None and value <= spec.above:
            return f"expected more than {spec.above:g}, got {value:g}", value
        if spec.at_most is not None and value > spec.at_most:
            return f"expected at most {spec.at_most:g}, got {value:g}", value
    return "", value


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
            head, _, reading = value.rpartition("@")
            value = f"@{reading}" if head else value.rsplit(":", 1)[-1] if value.startswith("python:") else ""
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
    head, _, reading = spec.rpartition("@")
    return [head if reading in ("prob", "logit", "log-odds") and head else spec]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
