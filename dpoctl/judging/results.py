"""Compare a judgements file with another policy's, and with another judge's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import log
from ..data.jsonl import read_jsonl
from ..errors import InputError
from . import statistics
from .summary import agreement, by_prompt


def compared(metrics: dict[str, Any], rows: Sequence[dict], options: dict[str, Any]) -> dict[str, Any]:
    """The metrics, with the comparison to another policy's judgements (compare) and another judge's (against) added.

    `options` are judge's, by their names in recipes. Raises InputError for an invalid file, and for one without any of
    these prompts or comparisons.
    """
    rows, compare, against = [row for row in rows if not row.get("canary")], options["compare"], options["against"]
    if compare:
        other = _read(compare)
        if names := {row.get("criterion", options["criterion"]) for row in other} - {options["criterion"]}:
            log.warn(f"{compare}: judged by criterion {', '.join(sorted(names))}, not {options['criterion']}")
        try:
            metrics["compare"] = statistics.paired_difference(by_prompt(rows), by_prompt(other), options["seed"])
        except ValueError:
            raise InputError(f"{compare}: judges none of these prompts", "both must judge the same prompts") from None
    if against:
        other, name = _read(against), Path(against).name
        metrics["against"] = agreement(rows, other)
        if metrics["against"] is None:
            raise InputError(f"{against}: judges none of these comparisons", "comparisons match by prompt_id and k")
        for person in metrics.get("people", ()):
            judged = [row for row in rows if row["judge"] == person]
            metrics.setdefault("agreement", {})[f"{person} and {name}"] = agreement(judged, other)
    return metrics


def _read(path: str) -> list[dict]:
    """The judgements of another file, without those of its canary."""
    rows = []
    for line, row in read_jsonl(path):
        if "check" in row:
            raise InputError(f"{path}: a file of judge --check", "give judgements of the same comparisons")
        for name in ("prompt_id", "k", "verdict"):
            if name not in row:
                raise InputError(f"{path}:{line}: field '{name}': missing; a judgement has it")
        if row["verdict"] not in ("a", "b", "tie", "invalid"):
            raise InputError(f"{path}:{line}: field 'verdict': expected a, b, tie or invalid, got {row['verdict']!r}")
        if not row.get("canary"):
            rows.append(row)
    return rows
