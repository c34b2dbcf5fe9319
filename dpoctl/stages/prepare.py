"""Prepare a task: texts for SFT, preferences where the task has them, and prompts for training and evaluation."""

from pathlib import Path
from typing import Any

from .. import log
from ..config.files import Prepare
from ..outputs.claims import Output
from ..outputs.files import json_line, write_atomic
from ..tasks import cnn_dm, hh, imdb, tldr, toy

TASKS = {"imdb": imdb, "hh": hh, "tldr": tldr, "cnn-dm": cnn_dm, "toy": toy}


def run(config: Prepare, output: Output) -> None:
    """Write the task's row files under --out."""
    out = Path(config.out)
    prepared = TASKS[config.task].prepare(config)
    if prepared.dropped is not None:
        log.say(f"dropped: {', '.join(f'{n} {reason}' for reason, n in prepared.dropped.items())}")
    for name, rows in prepared.files.items():
        write_atomic(out / name, "".join(map(json_line, rows)))
        log.say(f"{out / name}: {len(rows)} rows")
    models = [(path, None) for path in prepared.model_files]
    row_files = [(out / name, len(rows)) for name, rows in prepared.files.items()]
    output.finish([*models, *row_files], prepared.metrics, prepared.cost)


def plan(config: Prepare) -> dict[str, Any]:
    """What --dry-run shows."""
    return {"task": config.task} | TASKS[config.task].plan(config)
