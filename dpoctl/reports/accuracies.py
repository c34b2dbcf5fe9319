"""The table of accuracies by a column of preference rows, with which score, merge and train-rm end."""

from typing import Any

from .. import log
from ..judging.statistics import wilson
from .tables import Rows, show


def table(column: str, metrics: dict[str, Any]) -> Rows:
    """A row for each group of `metrics` (see outputs.accuracy), their unweighted mean, and all pairs."""
    by = metrics["accuracy_by"]
    rows = [[group, *_cells(of)] for group, of in by.items()]
    rows.append([f"mean of {len(by)} groups", f"{metrics['mean_accuracy_by']:.3f}", "", "", ""])
    return Rows([column, "accuracy", "95 %", "pairs", "ties"], [*rows, ["all pairs", *_cells(metrics)]])


def show_accuracies(column: str, metrics: dict[str, Any], title: str) -> None:
    """Print the table on stdout."""
    show(table(column, metrics), f"{title} (ties count half)")


def say_scores(out: str, metrics: dict[str, Any], by: str | None) -> None:
    """Say what score has scored; `by`: the column whose table is printed, None without one and of a shard."""
    kind = metrics["score_type"]
    if "mean_score" in metrics:
        log.say(f"{out}: {metrics['rows']} rows, mean score {metrics['mean_score']:.3f} ({kind})")
        return
    if metrics["pairs"]:  # a shard may have none
        ties = f", {metrics['ties']} ties counted half" if metrics["ties"] else ""
        log.say(f"{out}: accuracy {metrics['accuracy']:.3f} on {metrics['pairs']} pairs{ties} ({kind})")
        sides = (f"{side} {metrics[f'mean_{side}_score']:.3f}" for side in ("chosen", "rejected"))
        log.say(f"mean score: {', '.join(sides)}")
    if by and "accuracy_by" in metrics:
        show_accuracies(by, metrics, f"Accuracy by {by}")


def _cells(of: dict[str, Any]) -> list[str]:
    low, high = wilson(of["accuracy"], of["pairs"])
    return [f"{of['accuracy']:.3f}", f"{low:.3f}–{high:.3f}", str(of["pairs"]), str(of["ties"])]
