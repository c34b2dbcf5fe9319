"""Claiming a command's output and running its stage there; a finished output answers without loading anything."""

import importlib
from types import ModuleType
from typing import Any

from .. import log
from ..config.files import Merge
from ..config.schema import as_options, identity, inputs
from ..config.training import Frontier
from ..outputs import claims


def stage(name: str) -> ModuleType:
    """The module in `dpoctl.stages` that runs a command."""
    return importlib.import_module(f"dpoctl.stages.{name.replace('-', '_')}")


def inputs_of(config: Any) -> list[tuple[str, str, str]]:
    """(name, kind, path) of every input of the command."""
    if isinstance(config, Merge) and config.is_rows:
        return []  # merge itself has more to say of missing or incomplete shards
    found = inputs(config)
    return config.frontier_inputs(found) if isinstance(config, Frontier) else found


def claim(name: str, config: Any, by=claims.claim):
    """The claim of the command's output: a context that gives the Output."""
    return by(config.out, name, as_options(config), identity(config), inputs_of(config), overwrite=config.overwrite)


def run_claimed(name: str, config: Any) -> int:
    """Claim the output and run the stage; returns the exit code."""
    with claim(name, config) as output:
        if output.finished:
            log.say(f"{config.out}: complete already, nothing to do")
            return 0
        stage(name).run(config, output)
    return 0
