"""Rounds: runs of which each starts from the policy of another one and keeps its reference, by their manifests."""

from collections.abc import Sequence

from ..outputs.manifests import inputs_of
from .collect import Collected, Run

_SHOWN = 4  # names of policies of one reference in a sentence
POLICIES = ("train-dpo", "train-ppo")  # the stages whose policies have a KL to a reference


def starts_from(run: Run, other: Run) -> bool:
    """Whether a run started from the policy that another one trained to a KL from its reference."""
    start = next(iter(inputs_of(run.manifest, "model")), None)
    return bool(
        start
        and other.manifest
        and other.stage in POLICIES
        and run.stage in POLICIES
        and start["manifest"] == other.manifest.get("id") is not None
    )


def without_later(runs: Sequence[Run]) -> list[Run]:
    """The runs that start from no other of them: in what a later round reaches, the earlier ones have a part."""
    return [run for run in runs if not any(starts_from(run, other) for other in runs)]


def paths(runs: Sequence[Run]) -> list[list[Run]]:
    """Chains of two runs or more, in order. A run from which two others start belongs to the chains of both."""
    before = {id(run): _before(run, runs) for run in runs}
    followed = {id(other) for other in before.values()}
    chains = []
    for last in runs:
        if id(last) in followed:
            continue
        chain = [last]
        while (earlier := before[id(chain[0])]) is not None:
            chain.insert(0, earlier)
        if len(chain) > 1:
            chains.append(chain)
    return chains


def _before(run: Run, runs: Sequence[Run]) -> Run | None:
    """The round before a run: the one that it started from, with the same reference."""
    found = (other for other in runs if starts_from(run, other) and other.origin.reference == run.origin.reference)
    return next(found, None)


def told(collected: Collected) -> list[str]:
    """Sentences on policies whose KLs do not compare, because they are to different references."""
    found = []
    for run in collected.runs:
        for other in collected.runs:
            if starts_from(run, other) and other.origin.reference != run.origin.reference:
                found.append(
                    f"{run.name} starts from {other.name}, but its KL is to another reference: they are not rounds of "
                    "one path (train-dpo --ref keeps the first reference)"
                )
    return found or _several_references(collected)


def _several_references(collected: Collected) -> list[str]:
    """A sentence where the points of the plane have several references."""
    names: dict[str, list[str]] = {}
    for run in collected.runs:
        if run.origin.reference and any(p.get("kl") is not None for p in run.points):
            names.setdefault(run.origin.reference, []).append(run.name)
    for p in collected.evaluations:
        if p.origin.reference and p.get("kl") is not None and "effective_samples" not in p:
            names.setdefault(p.origin.reference, []).append(p.name)
    if len(names) < 2:
        return []
    groups = "; ".join(_some(list(dict.fromkeys(group))) for group in names.values())
    return [f"KLs are to different references, and do not compare between these groups: {groups}"]


def _some(names: list[str]) -> str:
    """Names, of many the first ones."""
    return ", ".join(names) if len(names) <= _SHOWN else f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"
