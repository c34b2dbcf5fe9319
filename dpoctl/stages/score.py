"""Add a scorer's score to rows that hold text: completions, texts, or prompt and completion."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from .. import log
from ..config.sampling import Score
from ..data.schema import stream_rows, warn_of_skipped
from ..inference.scorers import load_scorer
from ..outputs import shard_totals
from ..outputs.claims import Work
from ..outputs.row_writer import WaveWriter
from ..outputs.shards import Share, cut, share_of
from ..runtime import devices
from ..training import setup

_WAVE = 1024


def run(config: Score, work: Work) -> None:
    share, skipped = _share(config)
    device, _ = setup.open_device(config)
    scorer = load_scorer(config.scorer, device=str(device), revision=config.revision, text=config.score_text)
    writer = WaveWriter(work)
    state = writer.state or {"sum": 0.0}
    with log.progress("score", share.count, "rows", writer.rows[0]) as meter:
        for wave in _waves(config, share, writer.rows[0]):
            values = scorer.score(wave).values
            state = {"sum": state["sum"] + sum(values)}
            writer.write_wave([row | {"score": v} for row, v in zip(wave, values, strict=True)], state=state)
            meter.advance(len(wave))
    own = {"rows": share.count, "sum": state["sum"]}
    figures = shard_totals.of_score(own)
    cost = {"peak_memory_bytes": devices.peak_memory_bytes(device), "device": devices.device_name(device)}
    writer.finish(figures | {"reading": scorer.reading} | skipped, cost, share.record(own))
    log.say(f"{config.out}: {share.count} rows, mean score {figures['mean_score']:.3f} ({scorer.reading})")


def _share(config: Score) -> tuple[Share, dict[str, int]]:
    """(what this command scores, rows skipped by reason), from a first pass over the file in which every row is checked."""
    skipped: Counter = Counter()
    total = sum(1 for _ in stream_rows(config.data, "text", skip_bad=config.skip_bad_rows, skipped=skipped))
    warn_of_skipped(config.data, total, skipped)
    return share_of(config.shard, cut(total, _WAVE)), dict(skipped)


def _waves(config: Score, share: Share, done: int) -> Iterator[list[dict]]:
    """The share's rows behind those that are done, a wave at a time: never more than that in memory."""
    rows = (row for _, row in stream_rows(config.data, "text", skip_bad=config.skip_bad_rows))
    rows = islice(rows, share.first + done, share.first + share.count)
    while wave := list(islice(rows, _WAVE)):
        yield wave


def plan(config: Score) -> dict:
    return {"rows": _share(config)[0].count}
