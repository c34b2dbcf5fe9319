"""Options of judge for tournaments: more than two candidates, and candidates that are added later."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..outputs import tournaments
from .conditions import When, all_of, given, not_given
from .schema import option
from .shared import MANY

_PAIRS = (not_given("within"), not_given("scale"), not_given("check"))  # of several files
TWO = When(lambda c: not c.is_tournament, lambda c: "in a tournament", "with one or two candidates")


@dataclass(frozen=True, kw_only=True)
class Tournament:
    """Which pairs of several candidates are judged, and which are judged already."""

    baseline: str | None = option(
        None,
        "Judge every candidate against this completions file alone, in place of all pairs.",
        MANY,
        input="file",
        when=all_of(not_given("add"), *_PAIRS),
    )
    add: bool = option(
        False,
        "Add the candidates to the tournament of --to: only new pairs are judged.",
        MANY,
        when=all_of(*_PAIRS),
    )
    to: str | None = option(
        None,
        "The judgements, as dpoctl judge wrote them, that --add takes over.",
        MANY,
        input="file",
        when=given("add"),
    )

    def further_inputs(self) -> list[tuple[str, str, str]]:
        """The candidates of the earlier tournament. Raises InputError where --to is none."""
        if not (self.add and self.to):
            return []
        return [(tournaments.OPPONENTS, "file", one.path) for one in tournaments.read(self.to).entrants]

    def check_add(self) -> Iterator[str]:
        if self.add and not self.to:
            yield "--add needs --to, the judgements of the tournament that the candidates join"
