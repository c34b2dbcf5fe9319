"""The plan of make-prefs for --dry-run: samples, pairs, requests to a judge, and the memory of models."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, cast

from ..config.make_prefs import MakePrefs
from ..inference.memory import Phase
from ..inference.planning import PlannedSampling, RowPlan, SamplingPlan, scoring_phases
from ..inference.sources import BATCH
from ..models.ledger import Ledger
from ..outputs.shards import shard_range
from .comparisons import of_samples
from .costs import cost_lines, tokens_of, tokens_without_texts
from .pair_inputs import samples_of, votes_of
from .prompts import load_criterion


def lines(config: MakePrefs) -> dict[str, Any]:
    """What --dry-run prints."""
    if config.judgements:
        return _voted(config)
    return _given(config) if config.samples else _sampled(config)


def _sampled(config: MakePrefs) -> dict[str, Any]:
    k, plan = config.completions, SamplingPlan(cast(PlannedSampling, config), config.completions, [config.temperature])
    shown = plan.lines()
    asked = _asked(config, [k]) * (shown["completions"] // k)
    shown |= _at_most(config, asked if config.pairs == "all" else shown["completions"] // k, shown["completions"])
    if config.judge != "openai":
        return shown
    most = tokens_without_texts(load_criterion(config.criterion, config.prompt_noun)) + plan.width
    judgements = asked * _orders(config)
    most += 2 * config.max_new_tokens
    return (
        shown | {"judgements at most": judgements} | cost_lines(config, judgements, judgements * most, "at most about")
    )


def _given(config: MakePrefs) -> dict[str, Any]:
    files = samples_of(config)
    shard = shard_range(config.shard, files.batches(BATCH))
    part = slice(shard.first, shard.first + shard.count)
    sizes = files.sizes[part]
    asked = _asked(config, sizes)
    pairs = asked if config.pairs == "all" else sum(size > 1 for size in sizes)
    shown: dict[str, Any] = {"prompts": shard.count, "samples": sum(sizes)} | _at_most(config, pairs, sum(sizes))
    if config.scorer:
        shown |= Plan(config).memory_lines()
    if config.judge != "openai":
        return shown
    criterion, orders = load_criterion(config.criterion, config.prompt_noun), ("AB", "BA")[: _orders(config)]
    tokens = 0
    for rows in files.groups(part):
        chosen = list(combinations(rows, 2))[: None if config.pairs != "random" else 1]
        tokens += tokens_of(criterion, of_samples(chosen, orders, config.seed))
    judgements = asked * len(orders)
    return shown | {"judgements at most": judgements} | cost_lines(config, judgements, tokens)


def _voted(config: MakePrefs) -> dict[str, Any]:
    ballots, files = votes_of(config)
    if files is None:
        ballots.groups()  # which refuses chats
    pairs = ballots.count if config.pairs == "all" else len(ballots.prompts)
    shown = {"prompts": len(ballots.prompts), "compared pairs": ballots.count}
    return shown | _at_most(config, pairs, ballots.candidates)


def _at_most(config: MakePrefs, pairs: int, samples: int) -> dict[str, int]:
    return {"rows at most": samples} if config.unpaired else {"pairs at most": pairs}


def _asked(config: MakePrefs, sizes: Sequence[int]) -> int:
    """The pairs that are compared, of prompts with so many samples."""
    if config.judge and config.pairs == "random":
        return sum(size > 1 for size in sizes)
    return sum(size * (size - 1) // 2 for size in sizes)


def _orders(config: MakePrefs) -> int:
    return 2 if config.order == "both" else 1


class Plan(RowPlan):
    """Samples that exist, scored batch by batch."""

    def phases_of(self, config: MakePrefs, counted: Ledger) -> list[Phase]:
        return scoring_phases(self.open_scorer(config, counted), counted, BATCH)
