"""Completions of prompts, `n` each, as rows that carry their token ids."""

from .. import log
from ..artifacts import Work
from ..config import Sample
from ..data.writer import WaveWriter
from ..models.scorers import Scores, load_scorer
from ..training.sampling import Sampler, plan_of_sampling


def run(config: Sample, work: Work) -> None:
    sampler = Sampler(config, config.best_of or config.n)
    scorer = None
    if config.scorer:
        scorer = load_scorer(config.scorer, device=str(sampler.device), revision=config.revision)
    writer = WaveWriter(work)
    state = writer.state or {"ended": 0}
    total = len(sampler.ids) * sampler.n * len(config.temperature)
    with log.progress("sample", total, "completions", writer.rows[0] * (config.best_of or 1)) as meter:
        for i, temperature in enumerate(config.temperature):
            done = writer.waves_done - i * len(sampler.waves)
            for rows in sampler.rows(max(0, done), meter, temperature):
                rows = [{"temperature": temperature} | row for row in rows]
                if scorer:
                    rows = _best(rows, scorer.score(rows), config.best_of)
                state = {"ended": state["ended"] + sum(r["finish"] == "stop" for r in rows)}
                writer.write_wave(rows, state=state)
    kept = writer.rows[0]
    figures = {"prompts": len(sampler.ids), "completions": kept, "sampled": total, "ended": state["ended"] / kept}
    writer.finish(figures | sampler.prompts.skipped, sampler.cost())
    log.say(
        f"{config.out}: {kept} completions of {len(sampler.ids)} prompts, {figures['ended']:.0%} ended by themselves"
    )


def _best(rows: list[dict], scores: Scores, n: int) -> list[dict]:
    """Of each prompt's n rows the one with the highest key, with its score; the first where they tie.

    It is the file's only completion of the prompt, so its k is 0: files of one completion a prompt pair by prompt_id, k.
    """
    best = []
    for start in range(0, len(rows), n):
        i = max(range(start, start + n), key=lambda i: scores.keys[i])
        best.append(rows[i] | {"k": 0, "score": scores.values[i], "best_of": n, "best_k": rows[i]["k"]})
    return best


def plan(config: Sample) -> dict:
    return plan_of_sampling(config, (config.best_of or config.n) * len(config.temperature))
