"""Claim a command's output and run its stage; for a complete output nothing is loaded."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import log
from ..config.files import Merge
from ..config.schema import as_options, identity, inputs
from ..outputs import claims


def stage(name: str) -> ModuleType:
    """The module in `dpoctl.stages` that runs a command."""
    return importlib.import_module(f"dpoctl.stages.{name.replace('-', '_')}")


def inputs_of(config: Any) -> list[tuple[str, str, str]]:
    """(name, kind, path) of every input of the command."""
    if isinstance(config, Merge) and config.is_rows:
        return []  # merge checks its shards itself, with more specific messages
    return inputs(config)


def claim(name: str, config: Any, by: Callable[..., Any] = claims.claim) -> Any:
    """What `by` returns for the command's output: of `claims.claim`, a context manager that yields the Output."""
    return by(config.out, name, as_options(config), identity(config), inputs_of(config), overwrite=config.overwrite)


def run_claimed(name: str, config: Any) -> int:
    """Claim the output and run the stage; returns the exit code."""
    with claim(name, config) as output:
        if output.finished:
            log.say(f"{config.out}: complete already, nothing to do")
            return 0
        stage(name).run(config, output)
    return 0
