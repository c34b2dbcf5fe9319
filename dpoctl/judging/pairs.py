"""From verdicts on a prompt's samples to its preferences: of a judge that is asked, or of votes in judgements files."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ..config.make_prefs import MakePrefs
from ..inference import labels
from ..inference.pairing import (
    BY_VERDICTS,
    Decided,
    Decider,
    PairingOptions,
    count_samples,
    different,
    picked,
    preference,
)
from ..outputs.claims import Output
from .asking import Asking
from .ballots import Ballots
from .comparisons import Comparison, look_equal, of_samples
from .judges import open_judge
from .summary import INDIFFERENT, Vote, by_criterion, score_of, vote_on

Pair = tuple[int, int]  # indices of two samples of a prompt


class Decision(NamedTuple):
    """The share of the valid votes that are for the first of two samples, ties counted half; how many these are.

    A judge's probability is that share of its vote; one that is a tie (see summary.INDIFFERENT) is half."""

    share: float
    votes: int


def decision_of(votes: Sequence[Vote]) -> Decision:
    """The decision of votes `a`, `b`, `tie`, `invalid` and probabilities; of invalid ones alone no votes."""
    valid = [score_of(vote) for vote in votes if vote != "invalid"]
    valid = [0.5 if abs(score - 0.5) < INDIFFERENT else score for score in valid]
    return Decision(sum(valid) / len(valid) if valid else 0.5, len(valid))


def votes_of(rows: Sequence[dict]) -> list[Vote]:
    """A judge's votes on a comparison, from its judgements in all orders: each criterion of a rubric has one."""
    return [vote_on(of_criterion) for of_criterion in by_criterion(rows).values()]


def judged_pairs(
    options: PairingOptions, rows: Sequence[dict], decisions: Mapping[Pair, Decision], counts: dict[str, Any]
) -> list[dict]:
    """The preference rows of one prompt's samples, with the share of the votes for the chosen one.

    Even votes and comparisons without a valid one are counted and dropped. The best sample has the most votes.
    """
    strengths = [0.0] * len(rows)
    kept: list[Pair] = []
    for (i, j), (share, votes) in decisions.items():
        if not votes:
            counts["invalid"] += 1
            continue
        strengths[i] += share
        strengths[j] += 1 - share
        if share == 0.5:
            counts["ties"] += 1
        else:
            kept.append((i, j) if share > 0.5 else (j, i))
    made = []
    for w, l in picked(options, kept, strengths, rows, counts):  # noqa: E741
        share, votes = decisions[w, l] if (w, l) in decisions else decisions[l, w]
        made.append(preference(rows[w], rows[l], chosen_share=max(share, 1 - share), votes=votes))
    counts["pairs"] += len(made)
    return made


def judged_labels(rows: Sequence[dict], decisions: Mapping[Pair, Decision], counts: dict[str, Any]) -> list[dict]:
    """One prompt's samples with their labels, `win_rate` (mean share of the votes) and number of `comparisons`.

    Samples without a valid comparison are counted and dropped.
    """
    valid = {pair: share for pair, (share, votes) in decisions.items() if votes}
    won: dict[int, list[float]] = {}
    for (i, j), share in valid.items():
        won.setdefault(i, []).append(share)
        won.setdefault(j, []).append(1 - share)
    counts["invalid"] += len(rows) - len(won)
    kept = sorted(won)
    place = {i: n for n, i in enumerate(kept)}
    compared = [rows[i] | {"win_rate": round(sum(won[i]) / len(won[i]), 6), "comparisons": len(won[i])} for i in kept]
    return labels.ranked(compared, {(place[i], place[j]): share for (i, j), share in valid.items()}, counts)


def _start(config: MakePrefs) -> dict[str, Any]:
    return labels.BY_VERDICTS if config.unpaired else BY_VERDICTS


def _rows(
    config: MakePrefs, rows: Sequence[dict], decisions: Mapping[Pair, Decision], counts: dict[str, Any]
) -> list[dict]:
    if config.unpaired:
        return judged_labels(rows, decisions, counts)
    return judged_pairs(config, rows, decisions, counts)


class JudgedPairs(Decider):
    """A judge is asked about the pairs of each prompt's samples; of --pairs random about one of them."""

    def __init__(self, config: MakePrefs, state: dict[str, Any], output: Output):
        """`state`: that of an earlier run of the command. Raises InputError as `open_judge` does."""
        self.config, self.start = config, _start(config)
        self.judge = open_judge(str(config.judge), config, state.get("judge") or {}, output)
        self.asking = Asking(self.judge, config)

    def ahead(self, batches: Iterator[Sequence[list[dict]]]) -> Iterator[Sequence[list[dict]]]:
        """A judge that is asked in batch files is asked about all samples at once, which are held in memory."""
        if not (self.config.judge_batch or self.config.judge_batch_files):
            return batches
        held = list(batches)
        counts: Counter[str] = Counter()
        prompts = [rows for groups in held for rows in groups]
        self.asking.ahead([c for rows in prompts for c in self._comparisons(rows, self._asked(rows, counts))])
        return iter(held)

    def decide(self, groups: Sequence[list[dict]], counts: dict[str, Any]) -> Decided | None:
        """The pairs of a batch of prompts, or None where judgements are pending. Raises as Asking.rows does."""
        asked: list[dict[Pair, Comparison]] = []
        for rows in groups:
            pairs = self._asked(rows, counts)
            asked.append(dict(zip(pairs, self._comparisons(rows, pairs), strict=True)))
        judged = self.asking.rows([c for of_prompt in asked for c in of_prompt.values()])
        if judged is None:
            return None
        left = iter(judged)
        samples = [row for rows in groups for row in rows]
        count_samples(counts, samples)
        made = []
        for rows, of_prompt in zip(groups, asked, strict=True):
            each = self.judge.rows_each
            votes = {pair: votes_of(list(islice(left, len(c.orders) * each))) for pair, c in of_prompt.items()}
            decisions = {pair: decision_of(cast) for pair, cast in votes.items()}
            made += _rows(self.config, rows, decisions, counts)
        return Decided(made, samples)

    def _asked(self, rows: list[dict], counts: dict[str, Any]) -> list[Pair]:
        pairs = list(different(rows, counts, look_equal))
        if self.config.pairs == "random" and pairs:
            counts["not_picked"] += len(pairs) - 1
            pairs = [random.Random(f"{self.config.seed} {rows[0]['prompt_id']}").choice(pairs)]
        return pairs

    def _comparisons(self, rows: list[dict], pairs: Sequence[Pair]) -> Iterator[Comparison]:
        orders = ("AB", "BA") if self.config.order == "both" else ()
        return of_samples([(rows[i], rows[j]) for i, j in pairs], orders, self.config.seed)

    def finish(self) -> None:
        """Raises Interrupted where judgements are pending."""
        self.asking.finish()

    def state(self) -> dict[str, Any]:
        return {"judge": self.judge.state()}

    def cost(self) -> dict[str, Any]:
        return self.judge.cost()

    def metrics(self) -> dict[str, str]:
        return self.judge.metrics()


class VotedPairs(Decider):
    """The votes of judgements files decide."""

    def __init__(self, config: MakePrefs, ballots: Ballots):
        self.config, self.ballots, self.start = config, ballots, _start(config)

    def decide(self, groups: Sequence[list[dict]], counts: dict[str, Any]) -> Decided:
        made: list[dict] = []
        samples: list[dict] = []
        for rows in groups:
            voted, pairs = self.ballots.of_samples(rows)
            decisions: dict[Pair, Decision] = {}
            for pair, votes in pairs.items():
                if look_equal(*(voted[i] for i in pair)):
                    counts["duplicates"] += 1
                else:
                    decisions[pair] = decision_of(votes)
            made += _rows(self.config, voted, decisions, counts)
            samples += voted
        count_samples(counts, samples)
        return Decided(made, samples)
