"""Completions of prompts, `n` each, as rows that carry their token ids."""

from typing import Any

from .. import log
from ..config.sampling import Sample
from ..inference.planning import SamplingPlan
from ..inference.sampler import Sampler
from ..inference.scorers import Scores
from ..outputs import shard_totals
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter


def run(config: Sample, output: Output) -> None:
    """Write the completions, or of --best-of the best ones, batch by batch."""
    per_prompt, temperatures = _per_prompt(config), config.temperature
    opened = Sampler(config, per_prompt, temperatures, output=output, few_shot=config.few_shot, stop=config.stop)
    with opened as sampler:
        _write(config, output, sampler)


def _write(config: Sample, output: Output, sampler: Sampler) -> None:
    scorer = sampler.open_scorer(config.scorer, config) if config.scorer else None
    writer = RowWriter(output)
    state = writer.state or {"ended": 0}
    total = sampler.shard.count * sampler.n
    done = writer.batches_done
    with log.progress("sample", total, "completions", writer.rows[0] * (config.best_of or 1)) as meter:
        for batch, found in zip(sampler.batches[done:], sampler.rows(done, meter), strict=True):
            rows = [{"temperature": batch.temperature} | row for row in found]
            if scorer and config.best_of:
                rows = _best(rows, scorer.score(rows), config.best_of)
            state = {"ended": state["ended"] + sum(r["finish"] == "stop" for r in rows)}
            writer.write_batch(rows, state=state)
    counts = {"completions": writer.rows[0], "sampled": total, "ended": state["ended"]}
    metrics = {"prompts": len(sampler.prompt_set)} | shard_totals.of_sample(counts)
    writer.finish(metrics | sampler.prompt_set.skipped, sampler.cost(), sampler.shard.record(counts))
    log.say(
        f"{config.out}: {writer.rows[0]} completions of {metrics['prompts']} prompts, "
        f"{metrics['ended']:.0%} ended with an end token"
    )


def _per_prompt(config: Sample) -> int:
    """Completions that are sampled of each prompt."""
    return config.best_of or config.n


def _best(rows: list[dict], scores: Scores, n: int) -> list[dict]:
    """Of each prompt's n rows the one with the highest key, with its score; the first one of a tie.

    It is the file's only completion of the prompt, so its k is 0: files of one completion per prompt pair by prompt_id
    and k.
    """
    best = []
    for start in range(0, len(rows), n):
        i = max(range(start, start + n), key=lambda i: scores.keys[i])
        best.append(rows[i] | {"k": 0, "score": scores.values[i], "best_of": n, "best_k": rows[i]["k"]})
    return best


def plan(config: Sample) -> dict[str, Any]:
    """What --dry-run prints."""
    return SamplingPlan(config, _per_prompt(config), config.temperature, config.few_shot).lines()
