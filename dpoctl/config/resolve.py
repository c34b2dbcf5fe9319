"""The values of a command's options: flags override the recipe's section, which overrides `defaults:`."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import fields
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from ..errors import InputError, closest
from .commands import COMMANDS
from .recipe import Recipe, read_recipe
from .schema import Spec, base_type, flag_of, is_required, key_of, spec_of
from .scorer import parse_scorer


class Value(NamedTuple):
    """A value with where it comes from, in words.

    `explicit` values are refused where they have no effect: flags, and values of the command's section that differ from
    the default. A section may state a default, `defaults:` may be meant for other commands, and a preset's values were
    not asked for.
    """

    value: Any
    where: str
    explicit: bool


def resolve(cls: type, command: str, flags: dict[str, Any], recipe: str | None) -> Any:
    """The config of `command`: `flags` holds what the command line gave, by field name.

    Raises InputError that lists every unknown key, wrong type, value out of range, missing option, option without
    effect and impossible combination together.
    """
    problems: list[str] = []
    values = _recipe_values(cls, command, read_recipe(recipe), problems) if recipe else {}
    for f in fields(cls):
        if flags.get(f.name) is not None:
            values[f.name] = Value(flags[f.name], flag_of(f), True)
    _apply_preset(cls, values, problems)
    resolved, invalid = _checked(cls, values, problems)
    view = _View(cls, resolved, invalid)
    _derive(cls, values, view)
    problems += _without_effect(cls, values, view)
    problems += _impossible(cls, view)
    if problems:
        raise InputError(*_told(problems, f"see dpoctl {command} --help"))
    return cls(**resolved)


def _told(problems: list[str], otherwise: str) -> tuple[str, str]:
    """(message, hint): the advice of a single problem is the hint, that of several stands beside each.

    A problem with advice is "TEXT\\nhint: ADVICE".
    """
    parts = [problem.partition("\nhint: ") for problem in problems]
    if len(parts) == 1:
        return parts[0][0], parts[0][2] or otherwise
    return "\n       ".join(f"{text} ({advice})" if advice else text for text, _, advice in parts), otherwise


def _advice(text: str) -> str:
    return f"\nhint: {text}" if text else ""


def _checked(cls: type, values: dict[str, Value], problems: list[str]) -> tuple[dict[str, Any], set[str]]:
    """(the values in their types, the names of fields without a valid one)."""
    hints = get_type_hints(cls)
    resolved: dict[str, Any] = {}
    invalid: set[str] = set()
    for f in fields(cls):
        if f.name in values:
            problem, resolved[f.name] = _check(values[f.name].value, hints[f.name], spec_of(f))
            if problem:
                problems.append(f"{values[f.name].where}: {problem}")
                invalid.add(f.name)
        elif is_required(f):
            name = key_of(f).upper() if spec_of(f).argument else flag_of(f)
            problems.append(f"{name} is required ({spec_of(f).help.rstrip('.')})")
            invalid.add(f.name)
    return resolved, invalid


class _Invalid(Exception):
    """A check asks for an option that has no valid value."""


class _View:
    """A config as its checks and conditions see it, while some options may be invalid: asking for those raises."""

    def __init__(self, cls: type, resolved: dict[str, Any], invalid: set[str]):
        self._cls, self._resolved, self._invalid = cls, resolved, invalid

    def _add(self, more: dict[str, Any]) -> None:
        """Add values, which become those of the config too."""
        self._resolved.update(more)

    def __getattr__(self, name: str) -> Any:
        if name in self._invalid:
            raise _Invalid
        if name in self._resolved:
            return self._resolved[name]
        member = inspect.getattr_static(self._cls, name)
        if isinstance(member, property) and member.fget:
            return member.fget(self)
        return getattr(self._cls, name)


def _derive(cls: type, values: dict[str, Value], view: _View) -> None:
    """Add the defaults that depend on other options (of the config's method `derived`)."""
    if not hasattr(cls, "derived"):
        return
    try:
        view._add({name: value for name, value in cls.derived(view).items() if name not in values})
    except _Invalid:
        pass


def _without_effect(cls: type, values: dict[str, Value], view: _View) -> Iterator[str]:
    """Options that were given for this command, and that nothing reads with the other options."""
    for f in fields(cls):
        given, when = values.get(f.name), spec_of(f).when
        if given is None or not given.explicit:
            continue
        try:
            if not when.holds(view):
                advice = _advice(f"leave it out; it is read {when.help}")
                yield f"{given.where} has no effect {when.unmet(view)}{advice}"
        except _Invalid:
            pass


def _impossible(cls: type, view: _View) -> Iterator[str]:
    """What the config's own checks say (its methods named check_*), where the options that they look at are valid."""
    for name in dir(cls):
        if name.startswith("check_"):
            try:
                yield from getattr(cls, name)(view)
            except _Invalid:
                pass


def _apply_preset(cls: type, values: dict[str, Value], problems: list[str]) -> None:
    """Add what the chosen preset sets; explicit values must agree with it, except for those that it leaves open."""
    name = values["preset"].value if "preset" in values else None
    by_name, hints = {f.name: f for f in fields(cls)}, get_type_hints(cls)
    presets, left_open = getattr(cls, "PRESETS", {}), getattr(cls, "PRESET_OPEN", ())
    for key, value in presets[name].items() if isinstance(name, str) and name in presets else ():
        if key not in values:
            values[key] = Value(value, f"--preset {name}", False)
        elif key not in left_open:
            given, where, _ = values[key]
            if _check(given, hints[key], spec_of(by_name[key]))[1] != value:
                problems.append(f"{where}: {given} contradicts --preset {name}, which sets {value}")


def _recipe_values(cls: type, command: str, recipe: Recipe, problems: list[str]) -> dict[str, Value]:
    """Field name -> value from the recipe's `defaults:` and the command's section."""
    by_key, hints = {key_of(f): f for f in fields(cls)}, get_type_hints(cls)
    for section, line in recipe.lines.items():
        if section not in (*COMMANDS, "defaults"):
            near = _did_you_mean(section, (*COMMANDS, "defaults"))
            problems.append(f"{recipe.path}:{line}: {section}: no such section{near}")
    every = {key_of(f) for c in COMMANDS.values() for f in fields(c)}
    values: dict[str, Value] = {}
    for section in ("defaults", command):
        for key, (value, line) in recipe.sections.get(section, {}).items():
            where = f"{recipe.path}:{line}: {section}.{key}"
            if key in by_key:
                f = by_key[key]
                is_default = _check(value, hints[f.name], spec_of(f))[1] == f.default
                values[f.name] = Value(value, where, section == command and not is_default)
            elif section == command or key not in every:  # a default may be meant for other commands
                near = _did_you_mean(key, by_key if section == command else every)
                problems.append(f"{where}: no such option{near}")
    return values


def _did_you_mean(name: str, known: Any) -> str:
    near = closest(name, known)
    return _advice(f"did you mean {near}?" if near else "")


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


def _written(value: Any) -> str:
    """A value as a recipe or a command line writes it."""
    return json.dumps(value, default=str) if isinstance(value, (bool, list, tuple, dict)) else repr(value)


def _check_one(value: Any, kind: type, spec: Spec) -> tuple[str, Any]:
    if value in spec.words:
        return "", value
    if kind is float and isinstance(value, str):  # YAML reads 1e-6 as a text
        value = _number_or_text(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        return f"expected {' or '.join([_kind(kind), *spec.words])}, got {_written(value)}", value
    if spec.summed and value not in spec.choices:
        text = str(value)
        if "," in text or ":" in text or text in _respelt(spec):
            try:
                return "", spec.summed(text)
            except ValueError as e:
                return str(e), value
    if spec.choices and value not in spec.choices:
        wrong, name = f"{value!r} is not one of {', '.join(spec.choices)}", str(value).lower()
        return wrong + (_advice(spec.synonyms.get(name, "")) or _did_you_mean(name, spec.choices)), value
    if spec.input == "scorer":
        try:
            parse_scorer(str(value))
        except InputError as e:
            return e.message.removeprefix("scorer ") + _advice(e.hint), value
    return (_out_of_range(float(value), spec) if kind in (int, float) else ""), value  # type: ignore[arg-type]


def _respelt(spec: Spec) -> set[str]:
    """The choices with `-` for `_`, and the other way round."""
    return {c.replace("_", "-") for c in spec.choices} | {c.replace("-", "_") for c in spec.choices}


def _out_of_range(value: float, spec: Spec) -> str:
    """What is wrong with a number, empty where it is in range."""
    if value != value:
        return "expected a number, got nan"
    if spec.at_least is not None and value < spec.at_least:
        return f"expected at least {spec.at_least:g}, got {value:g}"
    if spec.above is not None and value <= spec.above:
        return f"expected more than {spec.above:g}, got {value:g}"
    if spec.at_most is not None and value > spec.at_most:
        return f"expected at most {spec.at_most:g}, got {value:g}"
    return ""
