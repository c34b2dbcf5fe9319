"""From the samples of a prompt to its preferences, by their scores; and what every way of deciding them shares.

As for controlled sentiment generation in 2305.18290, section 6 and appendix C.1. Standard library only.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice
from typing import Any, NamedTuple, Protocol

from ..data.stored import ID_FIELDS, carried
from ..outputs.shard_totals import BINS

OF_SAMPLES = ("prompts", "samples", "tokens", "with_ids", "ended", "with_finish")
OF_SCORES: dict[str, Any] = {"score_sum": 0.0, "histogram": {}, "score_types": {}}
_COUNTS = (*OF_SAMPLES, "pairs", "ties", "duplicates", "not_picked")
BY_SCORES: dict[str, Any] = dict.fromkeys((*_COUNTS, "below_margin"), 0) | OF_SCORES  # the counts at the start
BY_VERDICTS: dict[str, Any] = dict.fromkeys((*_COUNTS, "invalid"), 0)
_SAMPLE_FIELDS = ("completion", "k", "source_k", "finish", "score", *ID_FIELDS)
_ABSENT = object()


class PairingOptions(Protocol):
    """Which pairs of a prompt's samples are kept."""

    @property
    def pairs(self) -> str: ...

    @property
    def min_margin(self) -> float: ...

    @property
    def threshold(self) -> float | None: ...

    @property
    def seed(self) -> int: ...


class Scoring(Protocol):
    """A scorer."""

    score_type: str

    def score(self, rows: list[dict]) -> Any: ...


class Decided(NamedTuple):
    """The preferences of a batch of prompts, and its samples, with their scores where they have been scored."""

    pairs: list[dict]
    samples: list[dict]


class Decider(ABC):
    """What decides the pairs of samples; `start` are its counts before the first batch."""

    start: dict[str, Any]

    @abstractmethod
    def decide(self, groups: Sequence[list[dict]], counts: dict[str, Any]) -> Decided | None:
        """The pairs of each prompt's samples; everything is added to `counts`. None where some are not decided yet."""

    def ahead(self, batches: Iterator[Sequence[list[dict]]]) -> Iterator[Sequence[list[dict]]]:
        """The batches that `decide` will be given, for one that looks at all of them before."""
        return batches

    def finish(self) -> None:  # noqa: B027  # scores and votes are never pending
        """Raises Interrupted where a batch is not decided yet."""

    def state(self) -> dict[str, Any]:
        """JSON values that a resumed command needs, to be recorded with each batch."""
        return {}

    def cost(self) -> dict[str, Any]:
        """What the decisions cost, for the manifest."""
        return {}

    def metrics(self) -> dict[str, str]:
        """What the progress line shows."""
        return {}


class ScoredPairs(Decider):
    """The higher score is chosen: the scorer's, or without one that of the rows, compared as it is."""

    start = BY_SCORES

    def __init__(self, options: PairingOptions, scorer: Scoring | None):
        self.options, self.scorer = options, scorer

    def decide(self, groups: Sequence[list[dict]], counts: dict[str, Any]) -> Decided:
        rows = [row for group in groups for row in group]
        if self.scorer:
            scores = self.scorer.score(rows)
            keys, score_type = scores.keys, self.scorer.score_type
            rows = [row | {"score": value} for row, value in zip(rows, scores.values, strict=True)]
        else:
            keys, score_type = [row["score"] for row in rows], "given"
        count_samples(counts, rows)
        _count_scores(counts, rows, score_type)
        pairs, places = [], iter(zip(rows, keys, strict=True))
        for group in groups:
            scored, of_group = zip(*islice(places, len(group)), strict=True)
            pairs += self.of_prompt(scored, of_group, counts)
        return Decided(pairs, rows)

    def of_prompt(self, rows: Sequence[dict], keys: Sequence[float], counts: dict[str, Any]) -> list[dict]:
        """The rows of one prompt's samples; `keys` are what is compared."""
        made = scored_pairs(self.options, rows, keys, counts)
        counts["pairs"] += len(made)
        return made


def scored_pairs(options: PairingOptions, rows: Sequence[dict], keys: Sequence[float], counts: dict) -> list[dict]:
    """The preference rows of one prompt's samples; dropped pairs are counted in `counts`."""
    kept = []
    for i, j in different(rows, counts):
        if keys[i] == keys[j]:  # on log-odds, since equal probabilities may be saturated
            counts["ties"] += 1
        elif abs(rows[i]["score"] - rows[j]["score"]) < options.min_margin:
            counts["below_margin"] += 1
        else:
            kept.append((i, j) if keys[i] > keys[j] else (j, i))
    return [
        preference(rows[w], rows[l], margin=rows[w]["score"] - rows[l]["score"])
        for w, l in picked(options, kept, keys, rows, counts)  # noqa: E741
    ]


def different(
    rows: Sequence[dict], counts: dict, equal: Callable[[dict, dict], bool] | None = None
) -> Iterator[tuple[int, int]]:
    """The pairs of samples that are not `equal` (by default one answer); the others are counted."""
    equal = equal or are_equal
    for i, j in combinations(range(len(rows)), 2):
        if equal(rows[i], rows[j]):
            counts["duplicates"] += 1
        else:
            yield i, j


def are_equal(a: dict, b: dict) -> bool:
    """Whether two samples of a prompt are one answer: by token ids of one tokenizer, else by text."""
    if "completion_ids" in a and "completion_ids" in b and a["tokenizer"] == b["tokenizer"]:
        return a["completion_ids"] == b["completion_ids"]
    return a["completion"] == b["completion"]


def picked(
    options: PairingOptions,
    kept: list[tuple[int, int]],
    strengths: Sequence[float],
    rows: Sequence[dict],
    counts: dict[str, Any],
) -> list[tuple[int, int]]:
    """Those of one prompt's (chosen, rejected) that --pairs asks for; `strengths` say which samples are best and worst.
    The others are counted."""
    before = len(kept)
    if options.pairs == "best-worst" and kept:
        kept = [max(kept, key=lambda pair: strengths[pair[0]] - strengths[pair[1]])]
    elif options.pairs == "random" and kept:
        kept = [random.Random(f"{options.seed} {rows[0]['prompt_id']}").choice(kept)]
    counts["not_picked"] += before - len(kept)
    return kept


def preference(chosen: dict, rejected: dict, **more: Any) -> dict:
    """The preference row of two samples: what they share, the text of each, its ids, what is known of it, and `more`.

    Ids only where both samples have them, of one tokenizer and one prompt. Where one answer is text and the other
    messages, the text becomes a message.
    """
    chosen, rejected = _as_messages(chosen, rejected), _as_messages(rejected, chosen)
    row = {k: v for k, v in chosen.items() if k not in _SAMPLE_FIELDS and rejected.get(k, _ABSENT) == v}
    for side, sample in (("chosen", chosen), ("rejected", rejected)):
        row[side] = sample["completion"]
        row |= {f"{side}_{name}": sample[name] for name in ("score", "k", "finish") if sample.get(name) is not None}
    row |= more
    ids = [[sample.get(name) for name in ("prompt_ids", "tokenizer")] for sample in (chosen, rejected)]
    if ids[0] != ids[1] or any(sample.get("completion_ids") is None for sample in (chosen, rejected)):
        return row
    return row | {
        "prompt_ids": chosen["prompt_ids"],
        "chosen_ids": chosen["completion_ids"],
        "rejected_ids": rejected["completion_ids"],
        "tokenizer": chosen["tokenizer"],
        "texts": chosen["texts"] + rejected["texts"],
    }


def _as_messages(sample: dict, other: dict) -> dict:
    if not isinstance(sample["completion"], str) or isinstance(other["completion"], str):
        return sample
    return carried(sample) | {"completion": [{"role": "assistant", "content": sample["completion"]}]}


def count_samples(counts: dict, rows: Sequence[dict]) -> None:
    """Add a batch of samples to `counts`."""
    for name in ("with_finish", "with_ids"):  # absent in the progress files of older versions
        counts.setdefault(name, counts["samples"])
    counts["prompts"] += len({row["prompt_id"] for row in rows})
    counts["samples"] += len(rows)
    for row in rows:
        counts["ended"] += row.get("finish") == "stop"
        counts["with_finish"] += row.get("finish") is not None
        counts["with_ids"] += "completion_ids" in row
        counts["tokens"] += len(row.get("completion_ids", ()))


def _count_scores(counts: dict, rows: Sequence[dict], score_type: str) -> None:
    """Add the scores of a batch to `counts`, whose dictionaries are replaced."""
    histogram, of_type = dict(counts["histogram"]), counts.get("score_types", {})
    for row in rows:
        counts["score_sum"] += row["score"]
        low = str(min(BINS - 1, max(0, int(row["score"] * BINS))))
        histogram[low] = histogram.get(low, 0) + 1
    counts |= {"histogram": histogram, "score_types": of_type | {score_type: of_type.get(score_type, 0) + len(rows)}}
