"""Help pages: a sentence, usage, required options, the other options by panel, and examples to copy.

Drawn here rather than by typer, which separates arguments from options and re-wraps examples. Contexts and formatters
are untyped: their classes are in the private copy of click in typer.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from ..errors import InputError
from .pages import FIRST_STEPS, PAGES, SCORER

if TYPE_CHECKING:
    from rich.console import Console

    Rows = list[tuple[str, str]]  # (name, description as rich markup)

REQUIRED = "Required"
LAST_PANEL = "Run"
SCORER_METAVAR = "SCORER"
_ONE_FILE = "it takes one file: join them into one, or run the command once for each"
_ONCE = {  # of any other option the last value counts; of these one might expect all
    "prompts": _ONE_FILE,
    "eval_prompts": _ONE_FILE,
    "columns": "it takes one list: --columns prompt=question,chosen=better",
}
_MAX_WIDTH = 100
_MAX_NAME_WIDTH = 26  # a longer name has a line of its own, so that the descriptions have half of 80 columns


class Command(TyperCommand):
    """A command whose page lists its options in the order, and in the panels, that they are declared with."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            names = [param.name for param in given]
            for name, hint in _ONCE.items():
                if names.count(name) > 1 and not any(p.name == name and p.multiple for p in given):
                    raise InputError(f"--{name.replace('_', '-')}: given {names.count(name)} times", hint)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        required = [_name(p) for p in self.get_params(ctx) if _panel(p) == REQUIRED]
        optional = [f"[{_name(p)}]" for p in self.get_params(ctx) if _is_argument(p) and _panel(p) != REQUIRED]
        return [*required, *optional, "[OPTIONS]"]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        params = self.get_params(ctx)
        panels = {_panel(p): _rows(q for q in params if _panel(q) == _panel(p)) for p in params}
        if any(p.metavar == SCORER_METAVAR for p in params):
            panels[f"{SCORER_METAVAR} is one of"] = list(SCORER)
        examples = PAGES[self.name or ""].examples
        formatter.write(_page(self.help or "", self.get_usage(ctx), panels, ("Examples", examples)))


class Group(TyperGroup):
    """The application: its page lists the commands by group, and ends with the first ones to type."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # typer would import pydantic, 0.1 s, to convert None
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, Rows] = {}
        for name, command in self.commands.items():
            panels.setdefault(PAGES[name].group, []).append((name, command.help or ""))
        panels["Options"] = _rows(self.get_params(ctx))
        formatter.write(_page(self.help or "", self.get_usage(ctx), panels, ("First commands", FIRST_STEPS)))


def _page(sentence: str, usage: str, panels: "dict[str, Rows]", examples: tuple[str, Sequence[str]]) -> str:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, _MAX_WIDTH)
    with console.capture() as captured:
        console.print(f"{sentence}\n")
        console.print(Text(f"{usage}\n"))
        _print_panels(console, panels)
        title, commands = examples
        console.print(f"\n[bold]{title}[/bold]\n")
        for line in "\n".join(commands).splitlines():  # never re-wrapped
            console.print(Text(f"  {line}", style="dim" if line.startswith("#") else ""), soft_wrap=True)
    return captured.get()


def _print_panels(console: "Console", panels: "dict[str, Rows]") -> None:
    """Panels with one row a line of `Rows`; the descriptions start at the same column in all of them."""
    from rich.console import Group as Lines
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    names = [name for rows in panels.values() for name, _ in rows]
    width = max((len(name) for name in names if len(name) <= _MAX_NAME_WIDTH), default=_MAX_NAME_WIDTH)
    for title, rows in panels.items():
        lines: list[Text | Table] = []
        for name, description in rows:
            if len(name) > width:
                lines.append(Text(name, style="cyan"))
            table = Table.grid(padding=(0, 2), expand=True)
            table.add_column(style="cyan", no_wrap=True, width=width)
            table.add_column(ratio=1)
            table.add_row(name if len(name) <= width else "", description)
            lines.append(table)
        console.print(Panel(Lines(*lines), title=f"[not dim]{title}[/]", title_align="left", border_style="dim"))


def _rows(params: Iterable[Any]) -> "Rows":
    return [(_name(p), p.help or "") for p in params if not p.hidden]


def _name(param: Any) -> str:
    """`--lr X`, `-q, --quiet`, `TASK`."""
    if _is_argument(param):
        return param.metavar
    flags = ", ".join(sorted(param.opts, key=len))
    return f"{flags} {param.metavar}" if param.metavar else flags


def _panel(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or LAST_PANEL


def _is_argument(param: Any) -> bool:
    return param.param_type_name == "argument"
