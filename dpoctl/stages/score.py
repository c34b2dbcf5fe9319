"""Add a scorer's score to rows that hold text: completions, texts, or prompt and completion."""

from .. import log
from ..artifacts import Work
from ..config import Score
from ..data import counts
from ..data.jsonl import objects
from ..data.rows import Rows, load_rows
from ..data.shards import Share, cut, share_of
from ..data.writer import WaveWriter
from ..errors import InputError
from ..models.scorers import load_scorer
from ..training import runtime, setup

_WAVE = 1024


def run(config: Score, work: Work) -> None:
    rows, waves, share = _rows(config)
    device, _ = setup.open_device(config)
    scorer = load_scorer(config.scorer, device=str(device), revision=config.revision, text=config.score_text)
    writer = WaveWriter(work)
    state = writer.state or {"sum": 0.0}
    with log.progress("score", share.count, "rows", writer.rows[0]) as meter:
        for place in waves[writer.waves_done :]:
            wave = rows.rows[place]
            values = scorer.score(wave).values
            state = {"sum": state["sum"] + sum(values)}
            writer.write_wave([row | {"score": v} for row, v in zip(wave, values, strict=True)], state=state)
            meter.advance(len(wave))
    own = {"rows": share.count, "sum": state["sum"]}
    figures = counts.of_score(own)
    cost = {"peak_memory_bytes": runtime.peak_memory_bytes(device), "device": runtime.device_name(device)}
    writer.finish(figures | {"reading": scorer.reading} | rows.skipped, cost, share.record(own))
    log.say(f"{config.out}: {share.count} rows, mean score {figures['mean_score']:.3f} ({scorer.reading})")


def _rows(config: Score) -> tuple[Rows, list[slice], Share]:
    """All rows (completion rows where the first row is one, else text rows), the waves of them to do, the share."""

    def refuse(error: InputError) -> None:
        if not config.skip_bad_rows:
            raise error

    first = next((row for _, row in objects(config.data, refuse) if row is not None), {})
    kind = "completions" if "completion" in first and "prompt" in first else "text"
    rows = load_rows(config.data, kind, skip_bad=config.skip_bad_rows)
    waves = cut(len(rows.rows), _WAVE)
    share = share_of(config.shard, waves)
    return rows, waves[share.waves], share


def plan(config: Score) -> dict:
    return {"rows": _rows(config)[2].count}
