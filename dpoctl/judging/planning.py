"""The memory of a scorer as judge, for --dry-run."""

from ..config.judging import Judge
from ..inference.memory import Phase
from ..inference.planning import RowPlan, scoring_phases
from ..models.ledger import Ledger

_TEXTS = 128  # of a batch of comparisons


class Plan(RowPlan):
    """Batches of comparisons, both texts scored."""

    def phases_of(self, config: Judge, counted: Ledger) -> list[Phase]:
        """Scoring alone."""
        return scoring_phases(self.open_scorer(config, counted), counted, _TEXTS)
