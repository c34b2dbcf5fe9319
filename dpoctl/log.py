"""Messages and progress for the user, on stderr only.

On a terminal progress is a live bar; elsewhere, as in batch logs, it is a plain line every 15 seconds. rich honours
`NO_COLOR`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

console = Console(stderr=True, highlight=False, soft_wrap=True)
_verbosity = 0  # -2 errors only, -1 quiet, 0 normal, 1 verbose
_PLAIN_EVERY_S = 15.0


def set_verbosity(level: int) -> None:
    """-2 shows errors only, -1 (`-q`) warnings too, 0 normal messages, 1 (`-v`) details."""
    global _verbosity
    _verbosity = level


def only_warnings() -> None:
    """Show warnings and errors only, in a process whose work another process reports."""
    set_verbosity(min(_verbosity, -1))


def only_errors() -> None:
    """Show errors only, in a process whose messages another process shows."""
    set_verbosity(-2)


def say(text: str) -> None:
    """Show a normal message."""
    if _verbosity >= 0:
        console.print(escape(text))


def detail(text: str) -> None:
    """Show a message with `-v` only."""
    if _verbosity >= 1:
        console.print(escape(text), style="dim")


def warn(text: str) -> None:
    """Show a warning, even with `-q`."""
    if _verbosity >= -1:
        console.print(f"[yellow]warning:[/yellow] {escape(text)}")


def error(text: str) -> None:
    """Show an error and, on a line of its own, the hint after "\\nhint: " if there is one."""
    first, _, hint = text.partition("\nhint: ")
    console.print(f"[red]error:[/red] {escape(first)}")
    if hint:
        console.print(f"[cyan]hint:[/cyan] {escape(hint)}")


class Progress:
    """A counter of completed units, `done` of `total`, shown with the latest metrics and the time left."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.start_done = done, done
        self.start = self.last_line = time.monotonic()
        self.metrics: dict[str, str] = {}
        self.bar: Bar | None = None
        self.task: TaskID | None = None

    def advance(self, n: int = 1, **metrics: str) -> None:
        """Count `n` more units and show these metrics, as in `advance(8, loss="0.61")`."""
        self.done += n
        self.metrics.update(metrics)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, metrics=self._metrics())
        elif _verbosity >= 0 and time.monotonic() - self.last_line >= _PLAIN_EVERY_S:
            self.last_line = time.monotonic()
            self._plain_line()

    def _metrics(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.metrics.items())

    def _plain_line(self) -> None:
        seconds = time.monotonic() - self.start
        rate = (self.done - self.start_done) / max(seconds, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate > 0 else ""
        say(f"{self.what}: {self.done}/{self.total} {self.unit}  {self._metrics()}  {left}".rstrip())


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show progress over `total` units, of which `done` were completed by an earlier run."""
    meter = Progress(what, total, unit, done)
    if _verbosity < 0 or not sys.stderr.isatty():
        yield meter
        return
    from rich import progress as rp

    columns = [
        rp.TextColumn("{task.description}"),
        rp.BarColumn(bar_width=24),
        rp.MofNCompleteColumn(),
        rp.TextColumn(unit),
        rp.TextColumn("{task.fields[metrics]}"),
        rp.TimeRemainingColumn(),
    ]
    with rp.Progress(*columns, console=console, transient=True) as bar:
        meter.bar, meter.task = bar, bar.add_task(what, total=total, completed=done, metrics="")
        yield meter
