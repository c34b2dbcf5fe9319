"""Several scorers as one: their mean, or the lowest of their scores, row by row.

Reward models that were trained apart err on different texts, so that a policy gains less from the errors of one
(2310.02743). The scores are combined as they are: nothing is normalised.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import log
from ..config.scorer import MIXED_HINT, SCORE_TYPES, mixed_scales
from ..errors import InputError
from .scorer_base import Scorer, ScorerOptions, Scores


class CombinedScorer(Scorer):
    """`how` is `mean` or `min`. `score_type`: that of all members, `mixed` where they differ."""

    def __init__(self, name: str, options: ScorerOptions, how: str, members: Sequence[Scorer]):
        """Raises InputError where a member gives a probability and another one scores without bounds."""
        super().__init__(name, options)
        self.how, self.members = how, members
        types = list(dict.fromkeys(member.score_type for member in members))
        told = ", ".join(f"{member.name}: {member.score_type}" for member in members)
        if mixed_scales(types):
            raise InputError(f"scorer {name!r}: a probability beside scores without bounds ({told})", MIXED_HINT)
        self.score_type = types[0] if len(types) == 1 else "mixed"
        if len(types) > 1:
            log.warn(f"scorer {name!r}: the {how} of scores of different types ({told}), each on its own scale")

    def _score(self, rows: list[dict]) -> Scores:
        found = [member.score(rows) for member in self.members]
        values = self._combined([scores.values for scores in found])
        keys = [scores.keys for scores in found]
        if self.score_type == "prob" and self.how == "mean":
            return Scores(values.tolist(), _log_odds_of_mean(torch.tensor(keys, dtype=torch.float64)).tolist())
        by_log_odds = self.score_type in SCORE_TYPES  # of classifiers, as for one of them
        return Scores(values.tolist(), (self._combined(keys) if by_log_odds else values).tolist())

    def _combined(self, scores: list[list[float]]) -> Tensor:
        """[rows] float64 of the members' scores."""
        every = torch.tensor(scores, dtype=torch.float64)
        return every.mean(0) if self.how == "mean" else every.amin(0)


def _log_odds_of_mean(log_odds: Tensor) -> Tensor:
    """[rows] log-odds of the mean of probabilities, from the log-odds [members, rows] of each.

    log p - log (1 - p) from the logarithms of both, since the mean itself rounds to 1 where the members are certain.
    """
    return F.logsigmoid(log_odds).logsumexp(0) - F.logsigmoid(-log_odds).logsumexp(0)
