"""Settings of trained policies: equal for runs that differ in the seed alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..outputs.manifests import inputs_of
from . import frontier
from .collect import Collected
from .origins import Point


class Setting(NamedTuple):
    """What is swept, as text, and all that tells the settings of a method apart."""

    text: str
    options: str


def keys_of(collected: Collected) -> Callable[[Sequence[Point]], Setting]:
    """A function from the points of one model to its setting.

    Of a run it is what may not change when it is resumed, but for the seed, and the size of the model that it starts
    from, whose content differs from seed to seed where each has its own; of other points what they say of themselves.
    """
    settings: dict[str | None, dict[str, Any]] = {
        run.origin.policy: (run.manifest.get("identity") or run.options) | {"size": _size(run.manifest)}
        for run in collected.runs
        if run.manifest and run.origin.policy
    }

    def key_of(points: Sequence[Point]) -> Setting:
        swept = {frontier.swept_option(p) for p in points}
        every = settings.get(points[-1].origin.policy) or points[-1].get("options") or {}
        kept = {k: v for k, v in every.items() if k not in ("seed", "ilql_beta")}
        return Setting(swept.pop() if len(swept) == 1 else "", str(sorted(kept.items())))

    return key_of


def _size(manifest: dict[str, Any]) -> int:
    return sum(given.get("size") or 0 for given in inputs_of(manifest, "model"))
