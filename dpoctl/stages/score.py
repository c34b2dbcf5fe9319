"""Add a scorer's score to rows that hold text: completions, texts, or prompt and completion."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .. import log
from ..config.sampling import Score
from ..data.schema import stream_rows, warn_of_skipped
from ..inference.scorers import ScorerOptions, load_scorer
from ..models.pretrained import silence_transformers
from ..outputs import shard_totals
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter
from ..outputs.shards import Share, cut, share_of
from ..runtime.devices import open_compute

_BATCH = 1024


def run(config: Score, output: Output) -> None:
    """Write the rows with their scores, batch by batch."""
    share, skipped = _share(config)
    silence_transformers()
    compute = open_compute(config.device)
    scorer = load_scorer(
        config.scorer,
        ScorerOptions(compute.device, config.scorer_revision, config.scorer_trust_remote_code, config.score_text),
    )
    writer = RowWriter(output)
    state = writer.state or {"sum": 0.0}
    with log.progress("score", share.count, "rows", writer.rows[0]) as meter:
        for batch in _batches(config, share, writer.rows[0]):
            values = scorer.score(batch).values
            state = {"sum": state["sum"] + sum(values)}
            writer.write_batch([row | {"score": v} for row, v in zip(batch, values, strict=True)], state=state)
            meter.advance(len(batch))
    counts = {"rows": share.count, "sum": state["sum"]}
    metrics = shard_totals.of_score(counts)
    cost = {"peak_memory_bytes": compute.peak_memory_bytes(), "device": compute.name}
    writer.finish(metrics | {"reading": scorer.score_type} | skipped, cost, share.record(counts))
    log.say(f"{config.out}: {share.count} rows, mean score {metrics['mean_score']:.3f} ({scorer.score_type})")


def _share(config: Score) -> tuple[Share, dict[str, int]]:
    """(the rows that this command scores, rows skipped by reason), from a first pass that checks every row."""
    skipped: Counter = Counter()
    total = sum(1 for _ in stream_rows(config.data, "text", skip_bad=config.skip_bad_rows, skipped=skipped))
    warn_of_skipped(config.data, total, skipped)
    return share_of(config.shard, cut(total, _BATCH)), dict(skipped)


def _batches(config: Score, share: Share, done: int) -> Iterator[list[dict]]:
    """The share's rows after the first `done`, one batch at a time in memory."""
    every = (row for _, row in stream_rows(config.data, "text", skip_bad=config.skip_bad_rows))
    rows = islice(every, share.first + done, share.first + share.count)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def plan(config: Score) -> dict[str, Any]:
    """What --dry-run prints."""
    return {"rows": _share(config)[0].count}
