"""How often the chosen completion of a pair scores higher, over all pairs and by a column of the rows.

Counts are JSON values that `shard_totals.add` adds over batches and shards: group -> pairs, right and ties. Standard
library only.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import InputError, closest

ALL = ""  # the group of pairs without a column
_MOST_GROUPS = 200  # a column with more values is no category

Counts = dict[str, dict[str, int]]


def tally(chosen: Iterable[float], rejected: Iterable[float], groups: Iterable[str]) -> Counts:
    """The counts of pairs with these scores, each pair in its group."""
    found: Counts = {}
    for better, worse, group in zip(chosen, rejected, groups, strict=True):
        of = found.setdefault(group, {"pairs": 0, "right": 0, "ties": 0})
        of["pairs"] += 1
        of["right"] += better > worse
        of["ties"] += better == worse
    return found


def metrics_of(counts: Counts) -> dict[str, Any]:
    """Accuracy with a tie counted half, pairs and ties; of groups also those of each, and the groups' unweighted mean.

    The accuracy of no pairs is None.
    """
    told = _accuracy({key: sum(of[key] for of in counts.values()) for key in ("pairs", "right", "ties")})
    if not counts or list(counts) == [ALL]:
        return told
    by = {group: _accuracy(counts[group]) for group in sorted(counts)}
    return told | {"accuracy_by": by, "mean_accuracy_by": sum(of["accuracy"] for of in by.values()) / len(by)}


def _accuracy(counts: Mapping[str, int]) -> dict[str, Any]:
    pairs, ties = counts["pairs"], counts["ties"]
    return {"accuracy": (counts["right"] + ties / 2) / pairs if pairs else None, "pairs": pairs, "ties": ties}


def group_of(row: Mapping[str, Any], column: str, place: str) -> str:
    """A row's value of the column, as text.

    Raises InputError, naming `place`, where it has none, or a list or an object.
    """
    value = row.get(column)
    if isinstance(value, str | int | float):
        return str(value)
    if value is None:
        near = closest(column, row)
        hint = f"did you mean --by {near}?" if near else f"its columns are {', '.join(row)}"
        raise InputError(f"{place}: field '{column}': missing (--by {column})", hint)
    raise InputError(f"{place}: field '{column}': expected a text or a number (--by {column}), got {value!r:.40}")


def check_groups(groups: Collection[str], column: str) -> None:
    """Raises InputError for a column with so many values that it names rows, not categories."""
    if len(different := set(groups)) > _MOST_GROUPS:
        raise InputError(
            f"--by {column}: the column has {len(different)} values", f"expected a category: {_MOST_GROUPS} at most"
        )
