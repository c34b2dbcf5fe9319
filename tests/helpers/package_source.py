"""What tests read in the package's source: the imports of its files, and the options that they use."""

import ast
import inspect
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "dpoctl"
HOLDERS = {"config", "options", "settings", "merge"}  # what the code calls a config, or a part of its options


class Import:
    """One import: the library, the file of the package that it names (None outside), its line, and whether it runs at
    import time."""

    def __init__(self, library: str, target: Path | None, line: int, at_import: bool):
        self.library, self.target, self.line, self.at_import = library, target, line, at_import


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_file(parts: list[str]) -> Path | None:
    """The file of dpoctl.`parts`, where that is a module or package."""
    base = PACKAGE.joinpath(*parts)
    if base.with_suffix(".py").is_file() and parts:
        return base.with_suffix(".py")
    return base / "__init__.py" if (base / "__init__.py").is_file() else None


def imports(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    typing_only = {
        id(n)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for n in ast.walk(branch)
    }
    here = list(path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        at_import = id(node) not in late
        if isinstance(node, ast.Import):
            found += [Import(a.name.split(".")[0], None, node.lineno, at_import) for a in node.names]
            continue
        if not node.level:
            found.append(Import((node.module or "").split(".")[0], None, node.lineno, at_import))
            continue
        base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            target = module_file([*base, alias.name]) or module_file(base)
            assert target, f"{path}:{node.lineno}: {alias.name} is imported from nowhere"
            found.append(Import("dpoctl", target, node.lineno, at_import))
    return found


def reads(path: Path) -> set[str]:
    """The options that a file reads: attributes of a config, literal names in getattr, and keys of recorded options."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and name_of(node.value) in HOLDERS:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and name_of(node.func) == "getattr" and name_of(node.args[0]) in HOLDERS:
            found |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
        elif (
            isinstance(node, ast.Subscript) and name_of(node.value) in HOLDERS and isinstance(node.slice, ast.Constant)
        ):
            found.add(str(node.slice.value).replace("-", "_"))
        elif isinstance(node, ast.Assign) and name_of(node.targets[0]) == "_SHOWN":  # the plan of train-ppo
            found |= {word for c in ast.walk(node) if isinstance(c, ast.Constant) for word in str(c.value).split()}
    return found


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def closure(*starts: Path) -> set[Path]:
    """The files that are imported from some, in the package and below the command line."""
    seen: set[Path] = set()
    waiting = list(starts)
    while waiting:
        path = waiting.pop()
        if path not in seen and "config" not in path.relative_to(PACKAGE).parts:
            seen.add(path)
            waiting += [each.target for each in imports(path) if each.target]
    return seen


def read_by_properties(cls: type) -> set[str]:
    """The options that a config's own properties read for the stages."""
    found = set()
    for _, member in inspect.getmembers(cls, lambda m: isinstance(m, property)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(member.fget)))
        found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and name_of(n.value) == "self"}
    return found
