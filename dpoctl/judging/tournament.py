"""The comparisons of a tournament: of all pairs of candidates, of each with a baseline, or those that are new."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from .. import log
from ..config.judging import Judge
from ..config.schema import identity
from ..data.jsonl import read_jsonl
from ..data.readers import Rows, load_rows, refuse_repeated
from ..errors import InputError
from ..outputs import tournaments
from ..outputs.files import sha256_file
from . import judge_settings
from .comparisons import Comparison, Counterparts, counterpart, counterparts_in, drawn_order, of_rows

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Roster:
    """The candidates: a name and a file of each, and the pairs to be judged, by index.

    `baseline`: the name of the candidate that all others are compared with. `earlier`: the tournament to which some are
    added.
    """

    names: list[str]
    paths: list[str]
    pairs: Pairs
    baseline: str | None = None
    earlier: tournaments.Tournament | None = None


def load(config: Judge, inputs: Sequence[dict[str, Any]] = ()) -> tuple[list[Comparison], dict[str, Any]]:
    """(comparisons that are not judged yet, prompt after prompt; counts, with the names of candidates and baseline).

    `inputs`: as the output's manifest describes them, where there is one: the judge's files are compared too. Raises
    InputError for files without a common prompt, prompts that differ, and an earlier tournament that another judge
    decided or whose files have changed.
    """
    roster = roster_of(config)
    if earlier := roster.earlier:
        now = {"identity": identity(config), "inputs": inputs}
        judge_settings.refuse_others(earlier.path, earlier.manifest, now)
    files = [
        load_rows(path, "completions", skip_bad=config.skip_bad_rows, columns=config.columns) for path in roster.paths
    ]
    others = [counterparts_in(file) for file in files]
    order = {p: i for i, p in enumerate(dict.fromkeys(row["prompt_id"] for file in files for row in file.rows))}
    found: list[Comparison] = []
    for i, j in roster.pairs:
        pair = roster.names[i], roster.names[j]
        met = [_named(c, pair, config) for c in _compared(files[i], others[j])]
        if not met:
            hint = "rows pair by prompt_id, k and temperature"
            raise InputError(f"{roster.paths[i]} and {roster.paths[j]}: no row of one has a counterpart", hint)
        found += met
    found.sort(key=lambda c: order[c.prompt_id])  # stable: the pairs of a prompt in their order
    found = _limited(found, config, roster)
    _tell_missing(found, roster)
    counts: dict[str, Any] = {"candidates": roster.names, "baseline": roster.baseline, "compared": len(found)}
    return found, counts | dict(sum((Counter(file.skipped) for file in files), Counter()))


def one_pair(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those of the pair of candidates that has the fewest; of two files all."""
    by_pair: dict[tuple[str | None, str | None], list[Comparison]] = {}
    for c in comparisons:
        by_pair.setdefault((c.a_of, c.b_of), []).append(c)
    return min(by_pair.values(), key=len, default=[])


def earlier_rows(config: Judge) -> list[dict[str, Any]]:
    """The judgements that --add takes over, in their order; without those of a canary. None without --add."""
    if not (config.add and config.to):
        return []
    earlier = tournaments.read(config.to)
    rows = [row for _, row in read_jsonl(earlier.path) if not row.get("canary")]
    a, b = (one.name for one in earlier.entrants[:2])
    return [row if "a_of" in row else row | {"a_of": a, "b_of": b} for row in rows]


def asked_since(config: Judge) -> dict[str, str]:
    """For the manifest's cost: when the judgements that --add takes over were asked for. Empty without --add."""
    if not (config.add and config.to):
        return {}
    cost = tournaments.read(config.to).manifest["cost"]
    return {"first_asked": cost.get("first_asked") or cost["started"]}


# --- who is compared with whom


def roster_of(config: Judge) -> Roster:
    """The candidates of a command. Raises InputError as `load` does."""
    refuse_repeated(config.candidates)
    if config.add and config.to:
        return _joined(config, tournaments.read(config.to))
    paths = list(config.candidates)
    at = None
    if config.baseline:
        same = [i for i, path in enumerate(paths) if Path(path).resolve() == Path(config.baseline).resolve()]
        paths += [] if same else [config.baseline]
        at = same[0] if same else len(paths) - 1
    names = tournaments.names_of(paths)
    pairs = list(combinations(range(len(paths)), 2)) if at is None else _against(at, range(len(paths)))
    if not pairs:
        raise InputError(f"{paths[0]}: is the only candidate", "give a candidate that differs from --baseline")
    return Roster(names, paths, pairs, None if at is None else names[at])


def _against(baseline: int, candidates: Sequence[int]) -> Pairs:
    return [(i, baseline) for i in candidates if i != baseline]


def _joined(config: Judge, earlier: tournaments.Tournament) -> Roster:
    """The candidates of an earlier tournament and those that are added; the pairs that are new."""
    before = earlier.entrants
    known = {one.sha256: one.name for one in before}
    for one in before:
        if Path(one.path).is_file() and sha256_file(Path(one.path)) != one.sha256:
            raise InputError(
                f"{one.path}: has changed since {earlier.path} was judged",
                hint="judge all candidates anew; answers that are cached cost nothing",
            )
    for path in config.candidates:
        if Path(path).is_file() and (name := known.get(sha256_file(Path(path)))):
            raise InputError(f"{path}: is the candidate {name} of {earlier.path}", "give candidates that are new")
    old, new = len(before), len(config.candidates)
    names = [one.name for one in before]
    names += tournaments.names_of(config.candidates, names)
    added = range(old, old + new)
    if earlier.baseline is not None:
        pairs = _against(names.index(earlier.baseline), added)
    else:
        pairs = [(i, j) for i, j in combinations(range(old + new), 2) if j >= old]
    return Roster(names, [one.path for one in before] + list(config.candidates), pairs, earlier.baseline, earlier)


# --- their rows


def _compared(first: Rows, others: Counterparts) -> Iterator[Comparison]:
    for line, row in zip(first.lines, first.rows, strict=True):
        other = counterpart(others, first, line, row)
        if other is not None:
            yield of_rows(row, other, ())


def _named(c: Comparison, pair: tuple[str, str], config: Judge) -> Comparison:
    both = config.order == "both" and config.backend != "human"
    orders = ("AB", "BA") if both else drawn_order(config.seed, c.prompt_id, f"{c.k} {' '.join(pair)}")
    return replace(c, orders=orders, a_of=pair[0], b_of=pair[1])


def _limited(found: list[Comparison], config: Judge, roster: Roster) -> list[Comparison]:
    """The comparisons of the first prompts; with --add those of the prompts of a limited tournament."""
    prompts = list(dict.fromkeys(c.prompt_id for c in found))
    kept = set(prompts[: config.limit])
    if roster.earlier and roster.earlier.options.get("limit"):
        kept = {row["prompt_id"] for row in earlier_rows(config)}
    found = [c for c in found if c.prompt_id in kept]
    if not found:
        raise InputError(f"{', '.join(config.candidates)}: none of the prompts that {config.to} judges")
    return found


def _tell_missing(found: list[Comparison], roster: Roster) -> None:
    """Warn of prompts that not every pair has."""
    pairs = Counter(prompt for prompt, *_ in {(c.prompt_id, c.a_of, c.b_of) for c in found})
    fewer = sum(count < len(roster.pairs) for count in pairs.values())
    if fewer:
        log.warn(f"{fewer} of {len(pairs)} prompts are not in every file: fewer pairs are compared with them")
