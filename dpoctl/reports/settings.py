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

    Runs are told apart by their loss, all numbers and the size of the model that they start from, whose files differ
    from seed to seed where each seed has its own reference; points of unknown runs by what they say of themselves.
    """
    options: dict[str | None, dict[str, Any]] = {
        run.origin.policy: run.options | {"size": sum(i.get("size") or 0 for i in inputs_of(run.manifest, "model"))}
        for run in collected.runs
        if run.origin.policy
    }

    def key_of(points: Sequence[Point]) -> Setting:
        swept = {frontier.swept_option(p) for p in points}
        every = options.get(points[-1].origin.policy) or points[-1].get("options") or {}
        kept = {k: v for k, v in every.items() if k == "loss" or isinstance(v, int | float)}
        kept = {k: v for k, v in kept.items() if k not in ("seed", "ilql_beta")}
        return Setting(swept.pop() if len(swept) == 1 else "", str(sorted(kept.items())))

    return key_of
