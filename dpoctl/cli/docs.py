"""`dpoctl docs`: the Markdown pages that ship with the package."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import InputError, closest

_PAGES = Path(__file__).parents[1] / "docs"


def topics() -> dict[str, str]:
    """Topic -> title, the first heading of its page."""
    return {path.stem: _title(path) for path in sorted(_PAGES.glob("*.md"))}


def run(
    topic: Annotated[
        Optional[str],  # noqa: UP045  # typer reads the annotation on Python 3.10 too
        typer.Argument(
            help="Page to print; without it the pages are listed.",
            show_default=False,
            metavar="TOPIC",
            rich_help_panel="Arguments",
            autocompletion=lambda incomplete: [name for name in topics() if name.startswith(incomplete)],
        ),
    ] = None,
) -> None:
    """Print a page: rendered on a terminal, as Markdown elsewhere. Raises InputError where there is no such page."""
    known = topics()
    if topic is None:
        width = max(map(len, known), default=0)
        print("\n".join(f"{name:<{width}}  {title}" for name, title in known.items()))
        return
    if topic not in known:
        near = closest(topic, known)
        raise InputError(
            f"{topic}: no such page" + (f" (did you mean {near}?)" if near else ""),
            hint="dpoctl docs lists the pages",
        )
    text = (_PAGES / f"{topic}.md").read_text(encoding="utf-8")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        console = Console()
        console.print(Markdown(text), width=min(console.width, 100))
    else:
        print(text, end="")


def _title(path: Path) -> str:
    with open(path, encoding="utf-8") as f:
        return next((line for line in map(str.strip, f) if line), "").lstrip("# ")
