"""Preferences from samples of prompts, by their scores, by a judge, or by votes; or single samples with a label.

As for controlled sentiment generation in 2305.18290, section 6 and appendix C.1, where a model is sampled and a
classifier scores.
"""

import time
from typing import Any, cast

from .. import log
from ..config.make_prefs import MakePrefs
from ..inference.labels import ScoredLabels
from ..inference.options import SamplerOptions
from ..inference.pairing import Decider, ScoredPairs
from ..inference.sources import InFiles, Sampled, Source, Texts
from ..judging.asking import say_cost
from ..judging.ballots import Ballots
from ..judging.pair_inputs import samples_of, votes_of
from ..judging.pair_plan import lines as plan_lines
from ..judging.pairs import JudgedPairs, VotedPairs
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter
from ..outputs.shard_totals import of_make_prefs
from ..reports.preferences import say_preferences


def run(config: MakePrefs, output: Output) -> None:
    """Write the preference rows, and on request the samples, batch by batch."""
    source, ballots = _source(config, output)
    with source:
        writer = RowWriter(output, config.completions_out)
        decider = VotedPairs(config, ballots) if ballots else _decider(config, writer.state, output, source)
        _write(config, source, writer, decider)


def _write(config: MakePrefs, source: Source, writer: RowWriter, decider: Decider) -> None:
    state = writer.state or decider.start
    started, before = time.monotonic(), state["samples"]
    with log.progress("make-prefs", source.samples, "samples", before) as meter:
        for groups in decider.ahead(source.groups(writer.batches_done, meter)):
            counts = dict(state)
            decided = decider.decide(groups, counts)
            meter.advance(0, **decider.metrics())
            if decided is None:  # what follows is asked for too, and written by the command that resumes
                continue
            state = counts | decider.state()
            samples = [decided.samples] if config.completions_out else []
            writer.write_batch(decided.pairs, *samples, state=state)
    decider.finish()
    seconds = time.monotonic() - started
    metrics, cost = of_make_prefs(state), decider.cost()
    counts = {name: value for name, value in state.items() if name != "judge"}  # what merging adds up
    writer.finish(metrics | dict(source.skipped), source.cost() | cost, source.shard.record(counts))
    rate = (state["samples"] - before) / max(seconds, 1e-9)
    score_types = None if config.shard else counts.get("score_types", {})
    say_preferences(config.out, metrics, f"{rate:.1f} samples/s", score_types)
    if "asked" in cost:
        log.say(say_cost(cost))


def _source(config: MakePrefs, output: Output) -> tuple[Source, Ballots | None]:
    """Where samples come from, and the votes of --judgements. Raises InputError for whatever is wrong with them."""
    if config.judgements:
        ballots, files = votes_of(config)
        if files:
            return InFiles(config, output, files, ballots.skipped), ballots
        return Texts(config, output, ballots.groups(), ballots.skipped), ballots
    if config.samples:
        return InFiles(config, output, samples_of(config), {}), None
    return Sampled(cast(SamplerOptions, config), config, config.completions, config.temperature, output), None


def _decider(config: MakePrefs, state: dict[str, Any], output: Output, source: Source) -> Decider:
    """What decides the pairs; `state` is that of an earlier run of the command.

    Raises InputError for whatever is wrong with it, before anything is sampled.

    Where a judge decides, all samples are made first, so that a command that resumes asks about the same ones.
    """
    if config.judge == "scorer" and source.holds_device:
        source.make_all(config.scorer)
        return JudgedPairs(config, state, output)
    if config.judge:
        judged = JudgedPairs(config, state, output)
        source.make_all()
        return judged
    decider = ScoredLabels if config.unpaired else ScoredPairs
    return decider(config, source.open_scorer(config.scorer) if config.scorer else None)


def plan(config: MakePrefs) -> dict[str, Any]:
    """What --dry-run prints."""
    return plan_lines(config)
