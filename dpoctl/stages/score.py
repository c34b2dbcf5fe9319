"""Add a scorer's score to rows that hold text: completions, texts, or prompt and completion."""

from .. import log
from ..artifacts import Work
from ..config import Score
from ..data.jsonl import objects
from ..data.rows import Rows, load_rows
from ..data.writer import WaveWriter
from ..errors import InputError
from ..models.scorers import load_scorer
from ..training import runtime, setup

_WAVE = 1024


def run(config: Score, work: Work) -> None:
    rows = _rows(config)
    device, _ = setup.open_device(config)
    scorer = load_scorer(config.scorer, device=str(device), revision=config.revision, text=config.score_text)
    writer = WaveWriter(work)
    state = writer.state or {"sum": 0.0}
    with log.progress("score", len(rows.rows), "rows", writer.rows[0]) as meter:
        for start in range(writer.waves_done * _WAVE, len(rows.rows), _WAVE):
            wave = rows.rows[start : start + _WAVE]
            values = scorer.score(wave).values
            state = {"sum": state["sum"] + sum(values)}
            writer.write_wave([row | {"score": v} for row, v in zip(wave, values, strict=True)], state=state)
            meter.advance(len(wave))
    mean = state["sum"] / len(rows.rows)
    cost = {"peak_memory_bytes": runtime.peak_memory_bytes(device), "device": runtime.device_name(device)}
    writer.finish({"rows": len(rows.rows), "mean_score": mean, "reading": scorer.reading} | rows.skipped, cost)
    log.say(f"{config.out}: {len(rows.rows)} rows, mean score {mean:.3f} ({scorer.reading})")


def _rows(config: Score) -> Rows:
    """Completion rows where the first row is one, else text rows."""

    def refuse(error: InputError) -> None:
        if not config.skip_bad_rows:
            raise error

    first = next((row for _, row in objects(config.data, refuse) if row is not None), {})
    kind = "completions" if "completion" in first and "prompt" in first else "text"
    return load_rows(config.data, kind, skip_bad=config.skip_bad_rows)


def plan(config: Score) -> dict:
    return {"rows": len(_rows(config).rows)}
