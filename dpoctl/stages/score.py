"""Add a scorer's score to rows that hold text (completions, texts, messages), or to both sides of preferences."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from .. import log
from ..config.sampling import Score
from ..data.readers import stream_rows, warn_of_skipped
from ..errors import InputError
from ..inference.memory import Phase
from ..inference.options import template_options
from ..inference.planning import RowPlan, scoring_phases
from ..inference.scored_pairs import START, are_pairs, score_pairs
from ..inference.scorers import Scorer, load_scorer, scorer_options
from ..models.ledger import Ledger
from ..models.pretrained import silence_transformers
from ..outputs import shard_totals
from ..outputs.accuracy import ALL, check_groups, group_of
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter
from ..outputs.shards import ShardRange, shard_range, slices
from ..reports import accuracies
from ..runtime.devices import open_compute

_BATCH = 1024


def run(config: Score, output: Output) -> None:
    """Write the rows with their scores, batch by batch."""
    reading = _reading(config)
    silence_transformers()
    compute = open_compute(config.device, config.dtype)
    scorer = load_scorer(config.scorer, scorer_options(config, compute, template_options(config, output)))
    writer = RowWriter(output)
    shard = reading.shard
    state = writer.state or (START if reading.pairs else {"sum": 0.0})
    with log.progress("score", shard.count, "rows", writer.rows[0]) as meter:
        for batch in _batches(config, reading, writer.rows[0]):
            scored, counts = _scored(config, scorer, batch) if reading.pairs else _scored_texts(scorer, batch)
            state = shard_totals.add(state, counts)
            writer.write_batch(scored, state=state)
            meter.advance(len(batch))
    counts = {"rows": shard.count} | state
    metrics = shard_totals.of_score(counts) | {"score_type": scorer.score_type}
    cost = {"peak_memory_bytes": compute.peak_memory_bytes(), "device": compute.name}
    writer.finish(metrics | reading.skipped, cost, shard.record(counts))
    accuracies.say_scores(config.out, metrics, None if config.shard else config.by)


def _scored_texts(scorer: Scorer, rows: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    values = scorer.score(rows).values
    return [row | {"score": v} for row, v in zip(rows, values, strict=True)], {"sum": sum(values)}


def _scored(config: Score, scorer: Scorer, rows: list[dict]) -> tuple[list[dict], dict[str, Any]]:
    return score_pairs(scorer, rows, [_group(config, row, config.data) for row in rows])


def _group(config: Score, row: dict, place: str) -> str:
    return group_of(row, config.by, place) if config.by else ALL


class Reading(NamedTuple):
    """What a first pass over the data finds, which checks every row.

    `pairs`: they are preferences. `skipped`: rows by reason.
    """

    shard: ShardRange
    skipped: dict[str, int]
    pairs: bool

    @property
    def kind(self) -> str:
        """The kind of the rows, for their reader."""
        return "preferences" if self.pairs else "text"


def _reading(config: Score) -> Reading:
    """Raises InputError for an invalid row, one without the column of --by, and --by for other rows than pairs."""
    skipped: Counter = Counter()
    pairs = are_pairs(config.data, config.columns)
    if config.by and not pairs:
        raise InputError(
            f"{config.data}: its first row is no preference, so there is no accuracy (--by {config.by})",
            hint="a preference has prompt, chosen and rejected",
        )
    total, groups = 0, set()
    kind = "preferences" if pairs else "text"
    for line, row in stream_rows(
        config.data, kind, skip_bad=config.skip_bad_rows, columns=config.columns, skipped=skipped
    ):
        total += 1
        groups.add(_group(config, row, f"{config.data}:{line}"))
    if config.by:
        check_groups(groups, config.by)
    warn_of_skipped(config.data, total, skipped)
    return Reading(shard_range(config.shard, slices(total, _BATCH)), dict(skipped), pairs)


def _batches(config: Score, reading: Reading, done: int) -> Iterator[list[dict]]:
    """The shard's rows after the first `done`, one batch at a time in memory."""
    every = (
        row
        for _, row in stream_rows(
            config.data, reading.kind, skip_bad=config.skip_bad_rows, columns=config.columns, again=True
        )
    )
    shard = reading.shard
    rows = islice(every, shard.first + done, shard.first + shard.count)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def plan(config: Score) -> dict[str, Any]:
    """What --dry-run prints."""
    reading = _reading(config)
    shown = {"rows": reading.shard.count} | ({"texts": 2 * reading.shard.count} if reading.pairs else {})
    return shown | Plan(config).memory_lines()


class Plan(RowPlan):
    """Batches of rows, scored."""

    def phases_of(self, config: Score, counted: Ledger) -> list[Phase]:
        scorer = self.open_scorer(config, counted)
        return scoring_phases(scorer, counted, _BATCH)
