"""A judge is asked batch after batch: what is pending, what it costs, and when it ends."""

from collections.abc import Sequence
from typing import Any

from ..config.judge_options import JudgeOptions
from ..errors import InputError, Interrupted
from .client import CostReached
from .comparisons import Comparison
from .judges import Judging


class Asking:
    """Asks a judge about one batch after another. Rows are written in order: after a gap the answers stay in the cache,
    and no batch is complete. `total`: the judgements of all batches, where it is known."""

    def __init__(self, judge: Judging, options: JudgeOptions, total: int | None = None):
        self.judge, self.options, self.total = judge, options, total
        self.pending = 0
        self.is_down = False  # retrying every other request too could take hours

    def ahead(self, comparisons: Sequence[Comparison]) -> None:
        """Tell the judge of all comparisons that follow: some ask about them at once.

        Raises InputError as the judge does, and Interrupted where its answers come later.
        """
        self.judge.ahead(comparisons)

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]] | None:
        """The judgements of a batch, or None where some of it or of an earlier one are pending.

        Raises InputError at --max-cost, and as the judge does.
        """
        expected = judgements(batch)
        if self.is_down:
            self.pending += expected
            return None
        try:
            rows = self.judge.rows(batch)
        except CostReached:
            raise self._cost_reached() from None
        self.is_down = bool(batch) and not rows
        self.pending += expected - len(rows) // self.judge.rows_each
        return None if self.pending else rows

    def finish(self) -> None:
        """Raises Interrupted where judgements are pending."""
        if self.pending:
            raise Interrupted(
                f"{self.pending} judgements are pending: {self.judge.last_failure}; the other answers are cached",
                hint="rerun the command to request only these",
            )

    def _cost_reached(self) -> InputError:
        cost = self.judge.cost()
        answers = cost["asked"] + cost["from_cache"]
        left = "" if self.total is None else f", {self.total - answers} are left"
        return InputError(
            f"--max-cost {self.options.max_cost:g} is reached: {cost['dollars']:.4f} dollars for {answers} answers"
            f"{left}",
            hint="rerun the command with a higher --max-cost to resume; the answers are cached",
        )


def judgements(batch: Sequence[Comparison]) -> int:
    """How many judgements the comparisons of a batch need."""
    return sum(len(c.orders) for c in batch)


def say_cost(cost: dict[str, Any]) -> str:
    """Tokens, dollars and answers of the cache, for the line with which a command ends."""
    dollars = f", {cost['dollars']:.4f} dollars" if "dollars" in cost else ""
    cached = f"; {cost['from_cache']} answers came from the cache" if cost["from_cache"] else ""
    return f"{cost['prompt_tokens']} prompt tokens, {cost['completion_tokens']} completion tokens{dollars}{cached}"
