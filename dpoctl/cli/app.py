"""The `dpoctl` application: its commands, and how every outcome becomes an exit code. No torch at import time."""

import os
from collections.abc import Callable
from typing import Annotated

import typer
from typer.completion import completion_init, install_callback, show_callback

from .. import __version__, log
from ..config.commands import COMMANDS
from ..errors import DpoctlError
from ..outputs.files import storage_error
from ..runtime import determinism
from . import docs, env, init, mistakes
from .command import add_command
from .help import Command, Group
from .pages import DESCRIPTION, PAGES

_MEMORY_HINT = (
    "a smaller --tokens-per-batch (training, log-probs), --generation-batch-size (generation) or "
    "--scorer-tokens-per-batch (scoring), or --dtype bfloat16"
)

app = typer.Typer(
    name="dpoctl",
    cls=Group,
    add_completion=False,  # declared below as plain flags: typer's own options take 0.1 s of every command
    pretty_exceptions_show_locals=False,  # a local may hold the judge's key
    context_settings={"help_option_names": ["-h", "--help"]},
    help=DESCRIPTION,
)


completion_init()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    install: Annotated[
        bool, typer.Option("--install-completion", callback=install_callback, is_eager=True, hidden=True)
    ] = False,
    show: Annotated[
        bool, typer.Option("--show-completion", callback=show_callback, is_eager=True, hidden=True)
    ] = False,
) -> None:
    if version:
        print(f"dpoctl {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


for _name, _page in PAGES.items():
    if _name in COMMANDS:
        add_command(app, _name)
_WITHOUT_STAGE: dict[str, Callable[..., None]] = {"init": init.run, "docs": docs.run, "env": env.run}
for _name, _call in _WITHOUT_STAGE.items():
    app.command(_name, cls=Command, help=PAGES[_name].summary)(_call)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        return app(argv, standalone_mode=False, prog_name="dpoctl") or 0
    except DpoctlError as e:
        log.error(str(e))
        return e.exit_code
    except typer.TyperException as e:
        command = next((word for word in argv if word in PAGES), None)
        log.error("\nhint: ".join(mistakes.told(e, command)))
        return 2
    except typer.Exit as e:
        return e.exit_code
    except typer.Abort:
        return 130
    except KeyboardInterrupt as e:
        by = f" by {e}" if str(e) else ""
        log.error(f"interrupted{by}\nhint: rerun the command to resume from the last saved state")
        return 75
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except MemoryError:
        log.error(f"out of memory\nhint: {_MEMORY_HINT}")
        return 2
    except RuntimeError as e:  # torch's OutOfMemoryError is one; torch is not imported here to ask
        if operation := determinism.missing(e):
            hint = "leave --deterministic out, or use --device cpu"
            log.error(f"--deterministic: {operation} has no deterministic algorithm on this device\nhint: {hint}")
            return 2
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        log.error(f"out of memory ({str(e).splitlines()[0]})\nhint: {_MEMORY_HINT}")
        return 2
    except Exception as e:  # a full disk or a missing permission: an OSError, or a library's own exception
        refused = storage_error(e, getattr(e, "filename2", None) or getattr(e, "filename", None))
        if refused is None:
            raise
        log.error(str(refused))
        return refused.exit_code
