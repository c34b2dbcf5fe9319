"""What people read while a command runs: lines and progress, on stderr only.

On a terminal progress is live; elsewhere (batch logs) it is a plain line now and then. `NO_COLOR` holds.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

console = Console(stderr=True, highlight=False, soft_wrap=True)
_verbosity = 0  # -2 errors only, -1 quiet, 0 normal, 1 verbose
_PLAIN_EVERY_S = 15.0


def set_verbosity(level: int) -> None:
    global _verbosity
    _verbosity = level


def only_errors() -> None:
    """For a process whose news another one tells: not even warnings."""
    set_verbosity(-2)


def say(text: str) -> None:
    """A line of normal news."""
    if _verbosity >= 0:
        console.print(escape(text))


def detail(text: str) -> None:
    """A line only `-v` shows."""
    if _verbosity >= 1:
        console.print(escape(text), style="dim")


def warn(text: str) -> None:
    """A line that `-q` shows too."""
    if _verbosity >= -1:
        console.print(f"[yellow]warning:[/yellow] {escape(text)}")


def error(text: str) -> None:
    first, _, hint = text.partition("\nhint: ")
    console.print(f"[red]error:[/red] {escape(first)}")
    if hint:
        console.print(f"[cyan]hint:[/cyan] {escape(hint)}")


class Progress:
    """Counts work done; `advance(n, loss="0.61")` moves it and sets the metrics that it shows."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.start_done = done, done
        self.start = self.last_line = time.monotonic()
        self.metrics: dict[str, str] = {}
        self.bar = None
        self.task = None

    def advance(self, n: int = 1, **metrics: str) -> None:
        self.done += n
        self.metrics.update(metrics)
        if self.bar is not None:
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
    """A progress display over `total` units of work of which `done` are already behind us."""
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
