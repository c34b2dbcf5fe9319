"""Recipes: YAML files with one section per command and `defaults:` for what they share. Each value keeps its line."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError


@dataclass
class Recipe:
    """`lines`: section -> line; `sections`: section -> key -> (value, line)."""

    path: str
    lines: dict[str, int] = field(default_factory=dict)
    sections: dict[str, dict[str, tuple[Any, int]]] = field(default_factory=dict)


def read_recipe(path: str) -> Recipe:
    """Read a recipe.

    Raises InputError, with file and line, where it is not YAML, not a mapping, gives a key twice, or holds a value that
    YAML's standard types do not cover.
    """
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
    recipe = Recipe(path)
    if root is None:
        return recipe
    for section, (node, line) in _entries(path, root, "a recipe is a mapping of sections").items():
        recipe.lines[section] = line
        if isinstance(node, yaml.ScalarNode) and not node.value:
            continue  # an empty section
        entries = _entries(path, node, f"section {section} is a mapping of options")
        recipe.sections[section] = {key: (_constructed(path, value), at) for key, (value, at) in entries.items()}
    return recipe


def _constructed(path: str, node: Any) -> Any:
    """The value of a node. Raises InputError for unknown tags, impossible dates and recursive values."""
    import yaml

    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as e:
        line = node.start_mark.line + 1
        raise InputError(f"{path}:{line}: not a valid value ({getattr(e, 'problem', None) or e})") from None


def _entries(path: str, node: Any, expected: str) -> dict[str, tuple[Any, int]]:
    """key -> (node, line) of a mapping. Raises InputError for other nodes, for keys that are no names or repeated."""
    if node.id != "mapping":
        hint = "for example: 'train-dpo:' then '  beta: 0.1'"
        raise InputError(f"{path}:{node.start_mark.line + 1}: {expected}", hint)
    found: dict[str, tuple[Any, int]] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.id != "scalar":
            raise InputError(f"{path}:{line}: {expected}, and a key is a name")
        if key.value in found:
            raise InputError(
                f"{path}:{line}: {key.value}: given twice, first at line {found[key.value][1]}", hint="keep one of them"
            )
        found[key.value] = (value, line)
    return found
