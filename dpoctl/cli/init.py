"""`dpoctl init`: a recipe of the package as a folder of the user's, which works without the package's source tree."""

import re
import shutil
from pathlib import Path
from typing import Annotated, Optional

import typer

from .. import log
from ..errors import InputError, closest

_PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """The recipes of the installed package, or of the source tree that the package is imported from."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def recipes() -> dict[str, str]:
    """Name -> first sentence of what the recipe does."""
    return {folder.name: _about(folder) for folder in sorted(recipes_folder().iterdir()) if _is_recipe(folder)}


def run(
    recipe: Annotated[
        Optional[str],  # noqa: UP045  # typer reads the annotation on Python 3.10 too
        typer.Argument(
            help="Name of the recipe; without it the recipes are listed.",
            show_default=False,
            metavar="RECIPE",
            rich_help_panel="Arguments",
            autocompletion=lambda incomplete: [name for name in recipes() if name.startswith(incomplete)],
        ),
    ] = None,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(
            help="Folder to create. [dim]\\[default: the recipe's name][/dim]",
            show_default=False,
            metavar="DIR",
            rich_help_panel="Arguments",
        ),
    ] = None,
) -> None:
    """Copy a recipe.

    Raises InputError where there is no such recipe, or where the folder exists and is not empty.
    """
    known = recipes()
    if recipe is None:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {about}" for name, about in known.items()))
        return
    if recipe not in known:
        near = closest(recipe, known)
        raise InputError(
            f"{recipe}: no such recipe" + (f" (did you mean {near}?)" if near else ""),
            hint=f"the recipes are {', '.join(known)}",
        )
    target = folder or Path(recipe)
    if target.is_file():
        raise InputError(f"{target}: is a file; a directory is needed", hint="choose another DIR")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target}: exists and is not empty", hint="choose another DIR: dpoctl init RECIPE DIR")
    copy(recipe, target)
    next_step = f"make -C {target}" if (target / "Makefile").is_file() else f"see {target / 'README.md'}"
    log.say(f"{target}: recipe {recipe}; next: {next_step}")


def copy(recipe: str, target: Path) -> None:
    """Copy a recipe's folder and the shared files that it names, which lie one level up, into `target`."""
    source = recipes_folder()
    shutil.copytree(source / recipe, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "smoke"))
    shared = {path.name: path for path in source.iterdir() if path.is_file()}
    texts = [path.read_text(encoding="utf-8") for path in target.glob("Makefile")]
    while texts:  # a shared file may name another one
        text = texts.pop()
        for name in [name for name in shared if re.search(rf"\b{re.escape(name)}\b", text)]:
            path = shared.pop(name)
            shutil.copy(path, target / name)
            texts.append(path.read_text(encoding="utf-8"))


def _is_recipe(folder: Path) -> bool:
    return (folder / "Makefile").is_file() or (folder / "README.md").is_file()


def _about(folder: Path) -> str:
    """The first sentence of the Makefile's comment, else of the README's text below its heading."""
    makefile = folder / "Makefile"
    if makefile.is_file():
        lines = makefile.read_text(encoding="utf-8").splitlines()
        comment = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
        text = " ".join(line.lstrip("# ") for line in comment)
    else:
        text = (folder / "README.md").read_text(encoding="utf-8").partition("\n\n")[2].partition("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".")
