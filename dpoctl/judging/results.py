"""The metrics of a judgements file, and its comparison with another policy's and with another judge's."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .. import log
from ..data.jsonl import read_jsonl
from ..data.readers import load_rows
from ..errors import InputError
from ..outputs.manifests import read_manifest
from . import judge_settings, statistics, tournament_summary
from .summary import agreement, are_soft, by_criterion, by_prompt, calibration, metrics_of


def metrics_with(counts: dict[str, Any], rows: Sequence[dict]) -> dict[str, Any]:
    """The counts with which a command began, and the metrics of its rows: of a tournament scores, else a summary."""
    if "candidates" not in counts:
        return counts | metrics_of(rows)
    return counts | tournament_summary.metrics_of(rows, counts["candidates"], counts["baseline"])


def examine_others(compare: str | None, against: str | None, is_tournament: bool, judged: dict[str, Any]) -> None:
    """Raise InputError where a file to compare with judges two files and this command several, or reverse; warn where
    its judge is another one (compare), or was asked another question (against).

    Called before anything is asked. `judged` says who judges here: identity and inputs, as manifests hold them.
    """
    for path in (compare, against):
        for line, row in islice(read_jsonl(path), 1) if path else ():
            if ("a_of" in row) != is_tournament:
                this, that = ("a tournament", "two files") if is_tournament else ("two files", "a tournament")
                raise InputError(f"{path}:{line}: judgements of {that}; this command judges {this}")
    if compare:
        judge_settings.warn_of_others(compare, read_manifest(compare), judged)
    if against:
        judge_settings.warn_of_other_question(against, read_manifest(against), judged)


def compared(metrics: dict[str, Any], rows: Sequence[dict], options: dict[str, Any]) -> dict[str, Any]:
    """The metrics, with the comparison to another policy's judgements (compare) and another judge's (against) added.

    `options` are judge's, by their names in recipes. Raises InputError for an invalid file, and for one without any of
    these prompts or comparisons. Of a rubric each criterion is compared with the same one of the other file.
    """
    if parts := metrics.get("by_criterion"):
        failed: dict[str, InputError] = {}
        for name, of_criterion in by_criterion(rows).items():
            try:
                compared(parts[name], of_criterion, options | {"criterion": name})
            except InputError as e:
                failed[name] = e
        if len(failed) == len(parts):
            raise failed.popitem()[1]
        for name, error in failed.items():  # it has no valid verdict, here or there
            log.warn(f"criterion {name}: {error.message}")
        return metrics
    if "grades" in metrics:
        return metrics
    rows, compare, against = [row for row in rows if not row.get("canary")], options["compare"], options["against"]
    if compare:
        other = _same_criterion(_read(compare), rows, compare)
        if names := {row.get("criterion", options["criterion"]) for row in other} - {options["criterion"]}:
            log.warn(f"{compare}: judged by criterion {', '.join(sorted(names))}, not {options['criterion']}")
        if are_soft(rows) != are_soft(other):
            log.warn(f"{compare}: one file has probabilities, the other verdicts: win rates differ by that too")
        try:
            metrics["compare"] = statistics.paired_difference(by_prompt(rows), by_prompt(other), options["seed"])
        except ValueError:
            raise InputError(f"{compare}: judges none of these prompts", "both must judge the same prompts") from None
    if against:
        other, name = _same_criterion(_read(against), rows, against), Path(against).name
        metrics["against"] = agreement(rows, other)
        if metrics["against"] is None:
            raise InputError(f"{against}: judges none of these comparisons", "comparisons match by prompt_id and k")
        if are_soft(rows) and (found := calibration(rows, other)):
            metrics["calibration"] = found
        for person in metrics.get("people", ()):
            of_person = [row for row in rows if row["judge"] == person]
            metrics.setdefault("agreement", {})[f"{person} and {name}"] = agreement(of_person, other)
    return metrics


def _same_criterion(other: list[dict], rows: Sequence[dict], path: str) -> list[dict]:
    """Of the other file's judgements by several criteria those by the criterion of these rows; else all."""
    criteria = by_criterion(other)
    name = next((row["criterion"] for row in rows), "")
    if len(criteria) > 1 and name not in criteria:
        hint = "criteria are matched by name"
        raise InputError(f"{path}: judged by {', '.join(criteria)}, not by {name}", hint)
    return criteria[name] if len(criteria) > 1 else other


def _read(path: str) -> list[dict]:
    """The judgements of another file, without those of its canary."""
    rows = load_rows(path, "judgements").rows
    if any("check" in row for row in rows):
        raise InputError(f"{path}: a file of judge --check", "give judgements of the same comparisons")
    return [row for row in rows if not row.get("canary")]
