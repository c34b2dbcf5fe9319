"""The values of a command's options: flags override the recipe's section, which overrides `defaults:`."""

from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..errors import InputError, closest
from .commands import COMMANDS
from .schema import Spec, base_type, flag_of, is_required, key_of, spec_of


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
    document = _load_yaml(recipe)
    own = {key_of(f): f.name for f in fields(cls)}
    values: dict[str, tuple[Any, str]] = {}
    for section, line in document["lines"].items():
        if section not in (*COMMANDS, "defaults"):
            near = closest(section, (*COMMANDS, "defaults"))
            problems.append(
                f"{recipe}:{line}: {section}: no such section" + (f" (did you mean {near}?)" if near else "")
            )
    every = {key_of(f) for c in COMMANDS.values() for f in fields(c)}
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
