"""Completions of prompts, `n` each, as rows that carry their token ids."""

from .. import log
from ..config.sampling import Sample
from ..inference.sampler import Sampler, plan_of_sampling
from ..inference.scorers import Scores, load_scorer
from ..outputs import shard_totals
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter
from ..outputs.shards import share_of


def run(config: Sample, output: Output) -> None:
    sampler = Sampler(config, config.best_of or config.n)
    batches = [(temperature, batch) for temperature in config.temperature for batch in sampler.batches]
    share = share_of(config.shard, [batch for _, batch in batches])
    scorer = None
    if config.scorer:
        scorer = load_scorer(config.scorer, device=str(sampler.device), revision=config.revision)
    writer = RowWriter(output)
    state = writer.state or {"ended": 0}
    total = share.count * sampler.n
    with log.progress("sample", total, "completions", writer.rows[0] * (config.best_of or 1)) as meter:
        for temperature, batch in batches[share.batches][writer.batches_done :]:
            rows = [{"temperature": temperature} | row for row in sampler.rows(batch, meter, temperature)]
            if scorer:
                rows = _best(rows, scorer.score(rows), config.best_of)
            state = {"ended": state["ended"] + sum(r["finish"] == "stop" for r in rows)}
            writer.write_batch(rows, state=state)
    own = {"completions": writer.rows[0], "sampled": total, "ended": state["ended"]}
    metrics = {"prompts": len(sampler.ids)} | shard_totals.of_sample(own)
    writer.finish(metrics | sampler.prompts.skipped, sampler.cost(), share.record(own))
    log.say(
        f"{config.out}: {writer.rows[0]} completions of {len(sampler.ids)} prompts, {metrics['ended']:.0%} ended by "
        "themselves"
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
    return plan_of_sampling(config, config.best_of or config.n, len(config.temperature))
