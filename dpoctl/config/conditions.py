"""When an option is read: conditions on the other options of a command. Standard library only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class When:
    """A condition under which an option is read.

    `holds(config)` evaluates it; `unmet(config)` completes "has no effect" where it does not hold; `help` is how a help
    page says when the option is read.
    """

    holds: Callable[[Any], bool]
    unmet: Callable[[Any], str]
    help: str


ALWAYS = When(lambda config: True, lambda config: "", "")


def given(name: str, flag: str = "") -> When:
    """With an option that has a value: `given("lora")` reads "with --lora", and fails "without --lora".

    `flag`: its flag, where that is not the field's name.
    """
    flag = flag or _flag(name)
    return When(lambda c: _is_given(c, name), lambda c: f"without {flag}", f"with {flag}")


def not_given(name: str, flag: str = "") -> When:
    """Without an option; `flag` as for `given`."""
    flag = flag or _flag(name)
    return When(lambda c: not _is_given(c, name), lambda c: f"with {flag}", f"without {flag}")


def one_of(name: str, *values: str) -> When:
    """With one of some values of another option; "TASK" stands for an argument."""
    flag = _flag(name)
    shown = values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"
    return When(
        lambda c: getattr(c, name) in values, lambda c: f"with {flag} {getattr(c, name)}", f"with {flag} {shown}"
    )


def not_a_file(name: str, names: tuple[str, ...]) -> When:
    """Unless an option that takes one of `names` or a file is given a file."""
    flag = _flag(name)
    return When(
        lambda c: getattr(c, name) in names or not Path(getattr(c, name)).is_file(),
        lambda c: f"with a file as {flag}",
        f"with a name as {flag}",
    )


def all_of(*conditions: When) -> When:
    """Where all of the conditions hold."""
    return When(
        lambda c: all(w.holds(c) for w in conditions),
        lambda c: next(w.unmet(c) for w in conditions if not w.holds(c)),
        _grouped([w.help for w in conditions if w.help], "and", " or "),
    )


def any_of(*conditions: When) -> When:
    """Where at least one of the conditions holds."""
    return When(
        lambda c: any(w.holds(c) for w in conditions),
        lambda c: _joined([w.unmet(c) for w in conditions], "and"),
        _grouped([w.help for w in conditions], "or", " and "),
    )


def _grouped(parts: list[str], word: str, inner: str) -> str:
    """The parts, with a comma before the word where a part has the other word within: `with --a or --b, and --c`."""
    if not any(inner in part for part in parts):
        return _joined(parts, word)
    return (f"; {word} " if any(f",{inner}" in part for part in parts) else f", {word} ").join(parts)


def _joined(parts: list[str], word: str) -> str:
    """`with --a or --b`, `without --a or --b`, `without --a and with --b`: a first word that all share is said once."""
    heads = {part.split()[0] for part in parts}
    if len(heads) == 1:
        head = heads.pop()
        word = "or" if head == "without" else word
        parts = [parts[0], *(part.removeprefix(f"{head} ") for part in parts[1:])]
    return f" {word} ".join(parts)


def _is_given(config: Any, name: str) -> bool:
    return getattr(config, name) not in (None, (), False, "")


def _flag(name: str) -> str:
    if name in ("task", "inputs", "candidates"):
        return name.upper()
    return "--" + name.rstrip("_").replace("_", "-")
