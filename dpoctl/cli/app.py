"""The `dpoctl` application: its commands, and how every outcome becomes an exit code. No torch at import time."""

import os

import typer

from .. import __version__, log
from ..config.commands import COMMANDS
from ..errors import DpoctlError, closest
from ..outputs.files import storage_error
from .command import add_command

UsageError = typer.BadParameter.__bases__[0]  # typer's own copy of click, or click: whichever is installed

app = typer.Typer(
    name="dpoctl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # older typers show them, and one holds the judge's key
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Direct Preference Optimization as its paper ran it: every stage a command, stages chained by files.",
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True)) -> None:
    if version:
        print(f"dpoctl {__version__}")
        raise typer.Exit()


for _name in COMMANDS:
    add_command(app, _name)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        return app(argv, standalone_mode=False, prog_name="dpoctl") or 0
    except DpoctlError as e:
        log.error(str(e))
        return e.exit_code
    except UsageError as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            print(e.format_message())
            return 0
        log.error(_usage(e))
        return 2
    except typer.Exit as e:
        return e.exit_code
    except typer.Abort:
        return 130
    except KeyboardInterrupt as e:
        by = f" by {e}" if str(e) else ""
        log.error(f"interrupted{by}\nhint: the same command again goes on where the last saved state stands")
        return 75
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except MemoryError:
        log.error(f"out of memory\nhint: {_MEMORY_HINT}")
        return 2
    except RuntimeError as e:  # torch's OutOfMemoryError is one; torch is not imported here to ask
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        log.error(f"out of memory ({str(e).splitlines()[0]})\nhint: {_MEMORY_HINT}")
        return 2
    except Exception as e:  # no room, or not allowed to write: an OSError, or a kind of a library's own
        refused = storage_error(e, getattr(e, "filename2", None) or getattr(e, "filename", None))
        if refused is None:
            raise
        log.error(str(refused))
        return refused.exit_code


_MEMORY_HINT = "a smaller --tokens-per-batch (training) or --generation-batch-size (generation), or --dtype bfloat16"


def _usage(e: UsageError) -> str:
    message = e.format_message()
    path = e.ctx.command_path if e.ctx else "dpoctl"
    if type(e).__name__ == "NoSuchOption" and e.ctx is not None:
        known = [o for p in e.ctx.command.params for o in p.opts]
        near = closest(e.option_name, known)
        message = f"no such option: {e.option_name}" + (f" (did you mean {near}?)" if near else "")
    elif e.ctx is not None and message.startswith("No such command"):
        name = message.split("'")[1]
        near = closest(name, COMMANDS)
        message = f"no such command: {name}" + (f" (did you mean {near}?)" if near else "")
    return f"{message}\nhint: see {path} --help"
