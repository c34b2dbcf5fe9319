"""The order of the package's folders, read from the imports of every file: one way, no cycles, no torch for help."""

import sys
from pathlib import Path

from helpers.package_source import PACKAGE, files, imports, room_of

# From top to bottom: a folder imports only from folders further down, or from one in its own row, without a cycle.
ORDER = [
    {"__main__"},
    {"cli"},
    {"stages"},
    {"reports", "tasks", "training", "judging"},
    {"inference"},
    {"config", "models"},
    {"data", "outputs"},
    {"runtime"},
    {"objectives"},
    {"errors", "log"},
    {"__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
APART = {("config", "models"), ("models", "config")}  # models/ takes values, never a config object
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "numpy", "tokenizers", "safetensors", "jinja2"}
ONLY_TORCH = {"objectives": {"torch"}}  # what these folders may import besides the standard library


def place(path: Path, line: int) -> str:
    return f"dpoctl/{path.relative_to(PACKAGE)}:{line}"


def test_folders_import_in_order():
    wrong = []
    for path in files():
        room = room_of(path)
        assert room in LEVEL, f"dpoctl/{room}: where in the order does it belong?"
        for each in imports(path):
            if each.library == "dpoctl" and each.target is None:
                wrong.append(f"{place(path, each.line)}: an absolute import of the package")
            if each.target is None:
                continue
            other = room_of(each.target)
            if LEVEL[other] < LEVEL[room] or (room, other) in APART:
                wrong.append(f"{place(path, each.line)}: {room} imports {other}")
            if room == other == "stages":
                wrong.append(f"{place(path, each.line)}: a stage imports another")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_cycles():
    """Neither among files, imports inside functions included, nor among folders."""
    by_file = {path: {each.target for each in imports(path) if each.target} - {path} for path in files()}
    by_room: dict[str, set[str]] = {}
    for path, targets in by_file.items():
        by_room.setdefault(room_of(path), set()).update(map(room_of, targets - {None}))
    for room, others in by_room.items():
        others.discard(room)
    packages = {path for path in by_file if path.name == "__init__.py"}
    for graph in ({k: v - packages for k, v in by_file.items()}, by_room):
        assert cycle(graph) == []


def cycle(graph: dict) -> list:
    """The nodes of a cycle, empty where there is none."""
    done: set = set()

    def visit(node, path: list) -> list:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in graph.get(node, ()):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := visit(node, []))), [])


def test_the_cycle_finder_finds_one():
    assert cycle({1: {2}, 2: {3}, 3: set()}) == []
    assert cycle({1: {2}, 2: {3}, 3: {2}}) == [2, 3, 2]


def test_objectives_import_torch_alone():
    for path in files():
        allowed = ONLY_TORCH.get(room_of(path))
        if allowed is not None:
            outside = {each.library for each in imports(path)} - {"dpoctl"} - set(sys.stdlib_module_names)
            assert outside <= allowed, path


def test_help_and_mistakes_import_nothing_heavy():
    """What the command line imports before a stage runs, followed through the package."""
    waiting = [PACKAGE / "__main__.py", PACKAGE / "cli" / "app.py"]
    seen: set[Path] = set()
    wrong = []
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for each in imports(path):
            if each.at_import and each.library in HEAVY:
                wrong.append(f"{place(path, each.line)}: {each.library}")
            if each.at_import and each.target:
                waiting += [each.target, *(p / "__init__.py" for p in each.target.parents if PACKAGE in p.parents)]
    assert not wrong, "\n" + "\n".join(wrong)
    assert len(seen) > 15  # the walk reaches the configs and the outputs


def test_it_reads_what_is_there():
    main = imports(PACKAGE / "__main__.py")
    assert any(each.target == PACKAGE / "cli" / "app.py" and not each.at_import for each in main)
    assert any(each.library == "sys" and each.at_import for each in main)
    assert {"torch", "transformers", "yaml"} <= {each.library for path in files() for each in imports(path)}
