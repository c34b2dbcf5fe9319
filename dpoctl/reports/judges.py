"""Who judged the win rates that a report shows together, and whether these are one judge."""

from collections.abc import Sequence

from ..judging import judge_settings
from ..judging.judge_settings import JudgedBy
from .collect import Collected, Contest, Judged

Shown = Judged | Contest


def caption(shown: Sequence[Shown]) -> str:
    """The judge of a table's rows: a line, or where there are several a line for each, after what it judged."""
    by: dict[JudgedBy, list[str]] = {}
    for one in shown:
        by.setdefault(one.judged_by, []).append(_title(one))
    if len(by) == 1:
        return f"Judge: {next(iter(by))}"
    return "\n".join(f"Judge of {', '.join(titles)}: {judge}" for judge, titles in by.items())


def different(collected: Collected) -> list[str]:
    """Which results of one criterion come from judges that differ, and in what: they do not compare."""
    shown: list[Shown] = [*collected.judged, *collected.contests]
    first: dict[str, Shown] = {}
    texts = []
    for one in shown:
        other = first.setdefault(one.judged_by.criterion, one)
        if found := _differences(other, one):
            texts.append(f"{_title(other)} and {_title(one)} are judged in different ways: {'; '.join(found)}")
    return texts


def _differences(one: Shown, other: Shown) -> list[str]:
    if one.manifest and other.manifest:
        return [difference.text for difference in judge_settings.differences(one.manifest, other.manifest)]
    names = one.judged_by.judge, other.judged_by.judge
    return [] if names[0] == names[1] else [f"by {names[0]} and by {names[1]}"]


def _title(one: Shown) -> str:
    return one.name if isinstance(one, Contest) else f"{one.name} against {one.against}"
