"""The closing summary of a training command: what changed, what it cost, where the model is, and the next command."""

import json
from pathlib import Path

from .. import log
from .task import Task

_SHOWN = (  # metric, how it is printed, digits
    ("loss", "loss", 4),
    ("rewards/accuracies", "accuracy", 3),
    ("rewards/margins", "margin", 3),
    ("accuracy", "accuracy", 3),
    ("margin", "margin", 3),
    ("objective/scores", "score", 3),
    ("objective/kl", "KL", 2),
    ("eval/loss", "held-out loss", 4),
    ("eval/rewards/accuracies", "held-out accuracy", 3),
    ("eval/rewards/margins", "held-out margin", 3),
    ("eval/accuracy", "held-out accuracy", 3),
)


def say_summary(task: Task, steps: int, seconds: float, tokens: int, peak_memory: int) -> None:
    """Print the summary of a run that ended after `steps` updates, from its metrics.jsonl."""
    config, out = task.config, Path(task.config.out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    log.say(f"{out}: {steps} updates of {config.batch_size} {task.unit}")
    for name, label, digits in _SHOWN:
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) > 1:
            log.say(f"  {label:<18} {values[0]:.{digits}f} -> {values[-1]:.{digits}f}")
        elif values:
            log.say(f"  {label:<18} {values[0]:.{digits}f}")
    rate = tokens / max(seconds, 1e-9)
    log.say(f"  {seconds:.0f} s, {rate:.0f} tokens/s, peak memory {peak_memory / 1e9:.2f} GB")
    log.say(f"  model: {out}")
    ref = getattr(config, "ref", None) or config.model
    log.say(f"  next:  {task.next_command.format(out=out, ref=ref, model=config.model)}")
