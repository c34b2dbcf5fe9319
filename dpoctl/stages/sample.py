"""Completions of prompts, `n` each, as rows that carry their token ids."""

from .. import log
from ..artifacts import Work
from ..config import Sample
from ..data.writer import WaveWriter
from ..training.sampling import Sampler, plan_of_sampling


def run(config: Sample, work: Work) -> None:
    sampler = Sampler(config, config.n)
    writer = WaveWriter(work)
    state = writer.state or {"ended": 0}
    total = len(sampler.ids) * config.n
    with log.progress("sample", total, "completions", writer.rows[0]) as meter:
        for rows in sampler.rows(writer.waves_done, meter):
            rows = [{"temperature": config.temperature} | row for row in rows]
            state = {"ended": state["ended"] + sum(r["finish"] == "stop" for r in rows)}
            writer.write_wave(rows, state=state)
    figures = {"prompts": len(sampler.ids), "completions": total, "ended": state["ended"] / total}
    writer.finish(figures | sampler.prompts.skipped, sampler.cost())
    log.say(
        f"{config.out}: {total} completions of {len(sampler.ids)} prompts, {figures['ended']:.0%} ended by themselves"
    )


def plan(config: Sample) -> dict:
    return plan_of_sampling(config, config.n)
