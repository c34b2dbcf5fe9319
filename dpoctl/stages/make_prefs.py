"""Sample completions of every prompt, score them, and keep pairs in which the higher score is chosen.

As for controlled sentiment generation in 2305.18290, section 6 and appendix C.1.
"""

import itertools
import random
import time
from typing import Any

from .. import log
from ..config.sampling import MakePrefs
from ..data.stored import ID_FIELDS
from ..inference.planning import SamplingPlan
from ..inference.sampler import Sampler
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter
from ..outputs.shard_totals import BINS, of_make_prefs
from ..reports.preferences import say_preferences

_NO_COUNTS: dict[str, Any] = {
    **dict.fromkeys(("prompts", "samples", "pairs", "ties", "below_margin", "duplicates", "not_picked"), 0),
    **{"score_sum": 0.0, "tokens": 0, "ended": 0, "histogram": {}, "score_types": {}},
}
_SAMPLE_FIELDS = ("completion", "k", "finish", "score", *ID_FIELDS)


def run(config: MakePrefs, output: Output) -> None:
    """Write the preference rows, and on request the samples, batch by batch."""
    with Sampler(config, config.completions, [config.temperature], output=output) as sampler:
        _write(config, output, sampler)


def _write(config: MakePrefs, output: Output, sampler: Sampler) -> None:
    scorer = sampler.open_scorer(config.scorer, config)
    writer = RowWriter(output, config.completions_out)
    counts = writer.state or _NO_COUNTS
    started = time.monotonic()
    before = counts["samples"]
    with log.progress("make-prefs", sampler.shard.count * config.completions, "samples", before) as meter:
        for rows in sampler.rows(writer.batches_done, meter):
            scores = scorer.score(rows)
            rows = [row | {"score": value} for row, value in zip(rows, scores.values, strict=True)]
            counts = _count_samples(counts, rows, scorer.score_type)
            pairs = []
            for i in range(0, len(rows), config.completions):
                samples = slice(i, i + config.completions)
                pairs.extend(_pairs(config, rows[samples], scores.keys[samples], counts))
            counts["pairs"] += len(pairs)
            writer.write_batch(pairs, *([rows] if config.completions_out else []), state=counts)
    seconds = time.monotonic() - started
    metrics = of_make_prefs(counts)
    writer.finish(metrics | sampler.prompt_set.skipped, sampler.cost(), sampler.shard.record(counts))
    sampler.discard_kept()
    rate = (counts["samples"] - before) / max(seconds, 1e-9)
    say_preferences(
        config.out, metrics, f"{rate:.1f} samples/s", None if config.shard else counts.get("score_types", {})
    )


def _pairs(config: MakePrefs, rows: list[dict], keys: list[float], counts: dict) -> list[dict]:
    """The preference rows of one prompt's samples; dropped pairs are counted in `counts`."""
    kept = []
    for i, j in itertools.combinations(range(len(rows)), 2):
        if rows[i]["completion_ids"] == rows[j]["completion_ids"]:
            counts["duplicates"] += 1
        elif keys[i] == keys[j]:  # on log-odds, since equal probabilities may be saturated
            counts["ties"] += 1
        elif abs(rows[i]["score"] - rows[j]["score"]) < config.min_margin:
            counts["below_margin"] += 1
        else:
            kept.append((i, j) if keys[i] > keys[j] else (j, i))
    before = len(kept)
    if config.pairs == "best-worst" and kept:
        kept = [max(kept, key=lambda pair: keys[pair[0]] - keys[pair[1]])]
    elif config.pairs == "random" and kept:
        kept = [random.Random(f"{config.seed} {rows[0]['prompt_id']}").choice(kept)]
    counts["not_picked"] += before - len(kept)
    return [_pair(rows[w], rows[l]) for w, l in kept]  # noqa: E741


def _pair(chosen: dict, rejected: dict) -> dict:
    """The preference row of two samples, with their token ids."""
    row = {k: v for k, v in chosen.items() if k not in _SAMPLE_FIELDS}
    for side, sample in (("chosen", chosen), ("rejected", rejected)):
        row |= {
            side: sample["completion"],
            f"{side}_score": sample["score"],
            f"{side}_k": sample["k"],
            f"{side}_finish": sample["finish"],
        }
    row["margin"] = chosen["score"] - rejected["score"]
    return row | {
        "prompt_ids": chosen["prompt_ids"],
        "chosen_ids": chosen["completion_ids"],
        "rejected_ids": rejected["completion_ids"],
        "tokenizer": chosen["tokenizer"],
        "texts": chosen["texts"] + rejected["texts"],
    }


def _count_samples(counts: dict, rows: list[dict], score_type: str) -> dict:
    """`counts` with a batch of samples added."""
    of_type = counts.get("score_types", {})  # absent in the progress files of older versions
    counts = counts | {"histogram": dict(counts["histogram"])}
    counts["score_types"] = of_type | {score_type: of_type.get(score_type, 0) + len(rows)}
    counts["prompts"] += len({row["prompt_id"] for row in rows})
    counts["samples"] += len(rows)
    counts["ended"] += sum(row["finish"] == "stop" for row in rows)
    for row in rows:
        counts["score_sum"] += row["score"]
        counts["tokens"] += len(row["completion_ids"])
        low = str(min(BINS - 1, max(0, int(row["score"] * BINS))))
        counts["histogram"][low] = counts["histogram"].get(low, 0) + 1
    return counts


def plan(config: MakePrefs) -> dict[str, Any]:
    """What --dry-run prints."""
    k = config.completions
    pairs = k * (k - 1) // 2 if config.pairs == "all" else 1
    shown = SamplingPlan(config, k, [config.temperature]).lines()
    return shown | {"pairs at most": shown["completions"] // k * pairs}
