"""From the samples of a prompt to rows of single completions with a label, for training on unpaired feedback.

A completion is desirable whose score is at least a threshold, or which beats more of its prompt's other samples than
beat it: for KTO, BCO and APO-zero on such rows (2402.01306, 2404.04656, 2408.06266). Standard library only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .pairing import OF_SAMPLES, OF_SCORES, PairingOptions, ScoredPairs, Scoring, different

Pair = tuple[int, int]  # indices of two samples of a prompt

_LABELS = (*OF_SAMPLES, "desirable", "undesirable")
BY_THRESHOLD: dict[str, Any] = dict.fromkeys(_LABELS, 0) | OF_SCORES  # the counts at the start
BY_RANK: dict[str, Any] = dict.fromkeys((*_LABELS, "ties", "duplicates"), 0) | OF_SCORES
BY_VERDICTS: dict[str, Any] = dict.fromkeys((*_LABELS, "ties", "duplicates", "invalid"), 0)


class ScoredLabels(ScoredPairs):
    """The label is that of the score: against --threshold, or without one by its rank within the prompt."""

    def __init__(self, options: PairingOptions, scorer: Scoring | None):
        super().__init__(options, scorer)
        self.start = BY_RANK if options.threshold is None else BY_THRESHOLD

    def of_prompt(self, rows: Sequence[dict], keys: Sequence[float], counts: dict[str, Any]) -> list[dict]:
        threshold = self.options.threshold
        if threshold is not None:
            return [labelled(row, row["score"] >= threshold, counts) for row in rows]
        shares = {(i, j): 0.5 + 0.5 * ((keys[i] > keys[j]) - (keys[i] < keys[j])) for i, j in different(rows, counts)}
        return ranked(rows, shares, counts)


def ranked(rows: Sequence[dict], shares: Mapping[Pair, float], counts: dict[str, Any]) -> list[dict]:
    """The rows of one prompt's samples that are above or below its middle; those in the middle are counted.

    `shares`: of two samples, how far the first is the better one, from 0 to 1. A sample is above the middle whose mean
    share is more than a half.
    """
    balance = [0.0] * len(rows)
    for (i, j), share in shares.items():
        balance[i] += share - 0.5
        balance[j] -= share - 0.5
    counts["ties"] += sum(abs(b) < 1e-9 for b in balance)  # shares of three votes do not cancel exactly
    return [labelled(row, b > 0, counts) for row, b in zip(rows, balance, strict=True) if abs(b) >= 1e-9]


def labelled(row: dict, desirable: bool, counts: dict[str, Any]) -> dict:
    """A sample with its label, without fields that are null."""
    counts["desirable" if desirable else "undesirable"] += 1
    return {name: value for name, value in row.items() if value is not None} | {"label": desirable}
