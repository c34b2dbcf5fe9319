"""Add a scorer's score to rows that hold text: completions, texts, or prompt and completion."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .. import log
from ..config.sampling import Score
from ..data.readers import stream_rows, warn_of_skipped
from ..inference.memory import Phase
from ..inference.options import template_options
from ..inference.planning import RowPlan, scoring_phases
from ..inference.scorers import load_scorer, scorer_options
from ..models.ledger import Ledger
from ..models.pretrained import silence_transformers
from ..outputs import shard_totals
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter
from ..outputs.shards import ShardRange, shard_range, slices
from ..runtime.devices import open_compute

_BATCH = 1024


def run(config: Score, output: Output) -> None:
    """Write the rows with their scores, batch by batch."""
    shard, skipped = _shard(config)
    silence_transformers()
    compute = open_compute(config.device, config.dtype)
    scorer = load_scorer(config.scorer, scorer_options(config, compute, template_options(config, output)))
    writer = RowWriter(output)
    state = writer.state or {"sum": 0.0}
    with log.progress("score", shard.count, "rows", writer.rows[0]) as meter:
        for batch in _batches(config, shard, writer.rows[0]):
            values = scorer.score(batch).values
            state = {"sum": state["sum"] + sum(values)}
            writer.write_batch([row | {"score": v} for row, v in zip(batch, values, strict=True)], state=state)
            meter.advance(len(batch))
    counts = {"rows": shard.count, "sum": state["sum"]}
    metrics = shard_totals.of_score(counts)
    cost = {"peak_memory_bytes": compute.peak_memory_bytes(), "device": compute.name}
    writer.finish(metrics | {"score_type": scorer.score_type} | skipped, cost, shard.record(counts))
    log.say(f"{config.out}: {shard.count} rows, mean score {metrics['mean_score']:.3f} ({scorer.score_type})")


def _shard(config: Score) -> tuple[ShardRange, dict[str, int]]:
    """(the rows that this command scores, rows skipped by reason), from a first pass that checks every row."""
    skipped: Counter = Counter()
    total = sum(
        1
        for _ in stream_rows(
            config.data, "text", skip_bad=config.skip_bad_rows, columns=config.columns, skipped=skipped
        )
    )
    warn_of_skipped(config.data, total, skipped)
    return shard_range(config.shard, slices(total, _BATCH)), dict(skipped)


def _batches(config: Score, shard: ShardRange, done: int) -> Iterator[list[dict]]:
    """The shard's rows after the first `done`, one batch at a time in memory."""
    every = (
        row
        for _, row in stream_rows(
            config.data, "text", skip_bad=config.skip_bad_rows, columns=config.columns, again=True
        )
    )
    rows = islice(every, shard.first + done, shard.first + shard.count)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def plan(config: Score) -> dict[str, Any]:
    """What --dry-run prints."""
    return {"rows": _shard(config)[0].count} | Plan(config).memory_lines()


class Plan(RowPlan):
    """Batches of rows, scored."""

    def phases_of(self, config: Score, counted: Ledger) -> list[Phase]:
        scorer = self.open_scorer(config, counted)
        return scoring_phases(scorer, counted, _BATCH)
