"""Warnings about a preference run that goes wrong in the way that its log-ratios show."""

from .. import log
from ..objectives.preference import Objective

_DISPLACED = 0.1  # both completions lost this share of the reference's log-prob
_RUNAWAY = 3.0  # the rejected completion lost this many times the reference's log-prob


class LogRatioMonitor:
    """Checks each logged row; warns once of likelihood displacement, and once of an unbounded loss that runs away.

    It compares log-ratios with the reference's log-probs of the same batch: raw log-probs of two batches differ by what
    is in the batches. Losses without a reference have no log-ratios; their log-probs are compared with those of the
    first row, and only a runaway is looked for.
    """

    def __init__(self, loss: str, beta: float, objective: Objective):
        self.loss, self.beta, self.objective = loss, beta, objective
        self.first: dict[str, float] | None = None
        self.warned: set[str] = set()

    def check(self, row: dict[str, float]) -> None:
        """Look at a row of metrics.jsonl."""
        self.first = self.first or row
        if self.objective.needs_reference:
            chosen, rejected = (row[f"rewards/{side}"] / self.beta for side in ("chosen", "rejected"))
            ref_chosen, ref_rejected = row["logps/chosen"] - chosen, row["logps/rejected"] - rejected
        else:
            chosen, rejected = 0.0, row["logps/rejected"] - self.first["logps/rejected"]
            ref_chosen, ref_rejected = row["logps/chosen"], self.first["logps/rejected"]
        if chosen < -_DISPLACED * abs(ref_chosen) and rejected < -_DISPLACED * abs(ref_rejected):
            self._once(
                "displacement",
                f"update {row['step']}: likelihood displacement: the policy gives chosen and rejected completions a "
                f"lower probability than the reference does (log-ratios {chosen:+.1f} and {rejected:+.1f} nats). "
                "A larger --beta, a smaller --lr, or with pairs --loss rpo or dpop keeps the chosen log-probs up",
            )
        if not self.objective.bounded_below and rejected < -_RUNAWAY * abs(ref_rejected):
            self._once(
                "runaway",
                f"update {row['step']}: --loss {self.loss} has no lower bound and diverges (rejected log-probs fell by "
                f"{-rejected:.0f} nats). Try a smaller --lr, fewer updates, or a smaller weight of the unbounded term",
            )

    def _once(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            log.warn(text)
