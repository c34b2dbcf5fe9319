"""The house's one direction: who may import whom, read from the source of every file."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dpoctl"

BASE = {"artifacts", "files", "manifests", "tidy", "stopping", "errors", "launch", "log", "__init__"}
LIBRARY = {"models", "data", "objectives"} | BASE
ALLOWED = {  # room -> the rooms it may import; a room is a folder of dpoctl/ or a module of its own
    "__main__": {"cli", "stopping"},
    "cli": {"cli", "config", "options", "stages"} | BASE,
    "config": {"options"} | BASE,
    "options": {"config", "errors"},  # how options are declared and resolved: the other half of config
    "stages": {"config", "training", "judging", "reports"} | LIBRARY,
    "training": {"training"} | LIBRARY,
    "judging": {"judging"} | LIBRARY,
    "reports": {"reports", "judging"} | LIBRARY,  # a judgements file is shown by judging's own summary
    "models": LIBRARY,
    "data": LIBRARY - {"models"},
    "objectives": {"objectives"},
    "artifacts": {"files", "manifests", "tidy", "errors", "log", "__init__"},
    "files": {"errors"},  # whole or absent, and by their sums: what artifacts and the rest write with
    "manifests": {"files", "errors", "__init__"},
    "tidy": set(),
    "stopping": {"errors"},
    "launch": {"errors"},
    "log": set(),
    "errors": set(),
    "__init__": set(),
}
STANDARD = ("artifacts", "files", "manifests", "tidy", "stopping", "errors")  # rooms of the standard library alone
OUTSIDE = {"objectives": {"torch"}} | {room: set() for room in STANDARD}  # what these may import beside the stdlib
LIGHT = {
    "__main__",
    "__init__",
    "cli",
    "config",
    "options",
    "artifacts",
    "files",
    "manifests",
    "tidy",
    "stopping",
    "errors",
    "launch",
    "log",
}  # help and mistakes need these
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "numpy", "tokenizers", "safetensors"}


def imports(path: Path) -> list[tuple[str, str, int, bool]]:
    """(library, room, line, at module level) of each import of a file; the room is empty outside of dpoctl."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    here = ["dpoctl", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "dpoctl" else [base]
        else:
            continue
        for name in names:
            library, *rest = name.split(".")
            room = "" if library != "dpoctl" else rest[0] if rest and is_room(rest[0]) else "__init__"
            found.append((library, room, node.lineno, id(node) not in inner))
    return found


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_imports_run_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        own, where = parts[0], f"dpoctl/{path.relative_to(PACKAGE)}"
        assert own in ALLOWED, f"{where}: a room that this test does not know; DESIGN.md says where it stands"
        for library, room, line, top in imports(path):
            at = f"{where}:{line}"
            if room and room not in ALLOWED[own]:
                wrong.append(f"{at}: {own} imports {room}")
            if room and own in LIGHT and top and room not in LIGHT:
                wrong.append(f"{at}: {room} at import time, which --help must not wait for")
            if library in HEAVY and own in LIGHT and top:
                wrong.append(f"{at}: {library} at import time, which --help must not wait for")
            if not room and own in OUTSIDE and library not in OUTSIDE[own] | sys.stdlib_module_names:
                wrong.append(f"{at}: {own} imports {library}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_it_sees_what_there_is():
    """The reading itself: relative and absolute imports, inside functions and outside, of rooms and of names."""
    seen = {(library, room) for path in PACKAGE.rglob("*.py") for library, room, _, _ in imports(path)}
    assert {("torch", ""), ("dpoctl", "models"), ("dpoctl", "errors"), ("dpoctl", "__init__")} <= seen
    main = imports(PACKAGE / "__main__.py")
    assert ("dpoctl", "cli", False) in [(library, room, top) for library, room, _, top in main]
    assert ("sys", "", True) in [(library, room, top) for library, room, _, top in main]
