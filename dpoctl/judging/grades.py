"""From the grades of judge --scale to a summary of each file."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from . import statistics

Summary = dict[str, Any]


def metrics_of(rows: Sequence[dict]) -> dict[str, Any]:
    """Metrics of grades by one criterion: a summary for each file, by temperature and step where a file has several,
    and the canary's; of two files `difference`, the mean over common prompts of the first less the second."""
    main, canary = ([row for row in rows if bool(row.get("canary")) is is_canary] for is_canary in (False, True))
    files: dict[str, list[dict]] = {}
    for row in main:
        files.setdefault(row["of"], []).append(row)
    metrics: dict[str, Any] = {"grades": {name: _with_parts(graded) for name, graded in files.items()}}
    if canary:
        metrics["canary"] = summarise(canary)
    if len(files) == 2:
        one, other = (_by_prompt(graded) for graded in files.values())
        if one.keys() & other.keys():
            metrics["difference"] = statistics.paired_difference(one, other)
    return metrics


def _with_parts(rows: Sequence[dict]) -> Summary:
    shown = summarise(rows)
    for name in ("temperature", "step"):
        values = sorted({row[name] for row in rows if row.get(name) is not None})
        if len(values) > 1:
            parts = [{name: value} | summarise([r for r in rows if r.get(name) == value]) for value in values]
            shown[f"by_{name}"] = parts
    return shown


def summarise(rows: Sequence[dict]) -> Summary:
    """Mean grade with a 95 % interval by a bootstrap over prompts, how often each grade was given, the share of invalid
    answers by reason, and the mean length in words."""
    valid = [row for row in rows if row["grade"] is not None]
    grades = [row["grade"] for row in valid]
    reasons = Counter(row.get("reason") or "no verdict" for row in rows if row["grade"] is None)
    interval = list(statistics.bootstrap(grades, [row["prompt_id"] for row in valid])) if valid else None
    return {
        "n": len(valid),
        "mean": sum(grades) / len(grades) if grades else None,
        "interval": interval,
        "counts": {str(grade): grades.count(grade) for grade in sorted(set(grades))},
        "invalid": 1 - len(valid) / len(rows),
        "length": sum(len(row["completion"].split()) for row in rows) / len(rows),
    } | ({"invalid_reasons": dict(reasons.most_common())} if reasons else {})


def _by_prompt(rows: Sequence[dict]) -> dict[str, float]:
    """Mean grade by prompt."""
    grades: dict[str, list[int]] = {}
    for row in rows:
        if row["grade"] is not None:
            grades.setdefault(row["prompt_id"], []).append(row["grade"])
    return {prompt: sum(found) / len(found) for prompt, found in grades.items()}
