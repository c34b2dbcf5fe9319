"""A language model as judge: comparisons to requests, and replies to rows, whoever answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ..config.judge_options import JudgeOptions
from .comparisons import Comparison
from .questions import question_of
from .reading import read_reply
from .replies import Reply


class ChatJudge(ABC):
    """A language model that is asked in words about each comparison in each of its orders."""

    def __init__(self, config: JudgeOptions):
        """Raises InputError as question_of does."""
        self.config = config
        self.criterion = question_of(config)
        self.rows_each = self.criterion.rows_each
        self.last_failure = ""

    @abstractmethod
    def replies(self, requests: list[str]) -> list[Reply | None]:
        """The reply to each request; None where it failed for a transient reason."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """See Judging."""

    @abstractmethod
    def metrics(self) -> dict[str, str]:
        """See Judging."""

    @abstractmethod
    def cost(self) -> dict[str, Any]:
        """See Judging."""

    def ahead(self, comparisons: Sequence[Comparison]) -> None:  # noqa: B027  # single calls are made by `rows`
        """Ask about many comparisons at once; `rows` has their replies then."""

    def requests(self, comparisons: Sequence[Comparison]) -> list[str]:
        """The requests of comparisons, those of each in its orders."""
        asked = [(c, order) for c in comparisons for order in c.orders]
        return [self.criterion.request(c.prompt, *c.shown(o), f"{self.config.seed} {c.key}") for c, o in asked]

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]]:
        """Raises InputError and CostReached as `replies` does."""
        asked = [(c, order) for c in batch for order in c.orders]
        wanted = self.requests(batch)
        requests = list(dict.fromkeys(wanted))  # candidates of a tournament with equal texts are asked about once
        of = dict(zip(requests, self.replies(requests), strict=True))
        answered = [(c, order, of[request]) for (c, order), request in zip(asked, wanted, strict=True)]
        return [row for c, order, reply in answered if reply for row in self._rows(c, order, reply)]

    def _rows(self, c: Comparison, order: str, reply: Reply) -> list[dict[str, Any]]:
        """The judgements in one reply: several of a rubric."""
        if lines := self.criterion.lines:
            return lines.rows(c, order, reply, str(self.config.judge_model))
        return [self._row(c, order, reply)]

    def _row(self, c: Comparison, order: str, reply: Reply) -> dict[str, Any]:
        read = read_reply(reply, self.config)
        row = c.row(order, read.choice, self.config.criterion, str(self.config.judge_model), reply.raw)
        if read.p is not None:
            row["p"] = read.p if order == "AB" else 1 - read.p
        return row | ({"reason": read.reason.partition(":")[0]} if read.reason else {})
