"""Options of judge --check."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .conditions import all_of, given, one_of
from .schema import option
from .shared import CHECK

_CHECK = given("check")


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The judge is asked about pairs whose better answer is known."""

    check: bool = option(
        False,
        "Check the judge on a file of pairs whose better answer is known (preferences, people's judgements, or a, b "
        "and `preferred`): agreement, biases, and how often it is fooled.",
        CHECK,
        when=one_of("backend", "openai", "vllm", "transformers", "scorer"),
    )
    repeats: int = option(
        2,
        "Ask about each known pair so many times, to see how many verdicts change.",
        CHECK,
        at_least=1,
        metavar="N",
        when=all_of(_CHECK, one_of("backend", "openai", "vllm", "transformers")),
    )
    constructed: int = option(
        100,
        "Pairs of each kind that are made of the known ones: shuffled, cut, padded, with an instruction for the judge.",
        CHECK,
        at_least=0,
        metavar="N",
        when=_CHECK,
    )

    def check_check(self: Any) -> Iterator[str]:
        if self.check and len(self.candidates) != 1:
            yield "--check takes one file, of pairs whose better answer is known"
