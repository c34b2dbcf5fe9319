"""Options of the commands that ask a judge: judge, and make-prefs with --judge."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .conditions import When, all_of, given, not_given
from .judging_verdict import OF_VERDICTS, VerdictOptions
from .schema import NAME_OR_FILE, flag_named, option
from .shared import JUDGE, SERVER, Seeded, address_problem

CRITERIA = ("summary-s", "summary-c", "helpful", "sentiment")
ON_A_SERVER = (  # read where a chat-completions server is the judge
    *("judge_model", "judge_base_url", "judge_concurrency", "judge_timeout", "judge_retries", "judge_max_tokens"),
    *("judge_temperature", "price_in", "price_out", "max_cost", "judge_cache_dir"),
    *OF_VERDICTS,
    *("judge_batch", "judge_batch_poll", "batch_discount", "judge_batch_files"),
)
_ONLINE = ("judge_base_url", "judge_timeout", "judge_retries", "price_in", "price_out", "max_cost", "judge_batch")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(VerdictOptions, Seeded):
    """What is asked, with fences drawn from the seed, and of which server; the commands say when each is read."""

    criterion: str = option(
        "helpful",
        "What the judge decides by: summary-s (simple), summary-c (concise; the paper's main prompt), helpful, "
        "sentiment, or a template file; see dpoctl docs judging.",
        JUDGE,
        input=NAME_OR_FILE,
    )
    prompt_noun: str | None = option(
        None, "Noun for the prompt in the judge's question, such as 'news article' for cnn-dm.", JUDGE
    )
    order: str = option(
        "both",
        "Show A and B in both orders (a win counts if both answers agree), or in a random one.",
        JUDGE,
        choices=("both", "random"),
    )
    judge_model: str | None = option(
        None, "Name of the judge model on the server, for example gpt-5.2 or gpt-5-mini.", SERVER
    )
    judge_base_url: str | None = option(
        None, "Server other than OpenAI's, such as http://localhost:8000/v1.", SERVER, metavar="URL"
    )
    judge_concurrency: int = option(8, "Requests in flight.", SERVER, at_least=1, identity=False)
    judge_timeout: float = option(60.0, "Seconds to wait for an answer.", SERVER, above=0, identity=False)
    judge_retries: int = option(
        6,
        "Retries after transient failures (exponential backoff, or what the server asks for).",
        SERVER,
        at_least=0,
        identity=False,
    )
    judge_max_tokens: int = option(
        1024, "Longest answer of the judge in tokens, including hidden reasoning.", SERVER, at_least=8
    )
    judge_temperature: float | None = option(
        None,
        "Temperature of the judge (default: 0 at another server than OpenAI's, else the model's own).",
        SERVER,
        at_least=0,
    )
    price_in: float | None = option(None, "US dollars per million prompt tokens.", SERVER, at_least=0, identity=False)
    price_out: float | None = option(
        None, "US dollars per million completion tokens.", SERVER, at_least=0, identity=False
    )
    max_cost: float | None = option(
        None,
        "Stop before the answers cost more than X US dollars, earlier runs of the command included.",
        SERVER,
        above=0,
        identity=False,
    )
    judge_batch: bool = option(
        False,
        "Ask in batch files, which servers answer within a day, OpenAI's at half the price; see dpoctl docs "
        "judging-in-bulk.",
        SERVER,
        identity=False,
    )
    judge_batch_poll: float = option(30.0, "Seconds between two looks at the batches.", SERVER, above=0, identity=False)
    batch_discount: float = option(
        0.5,
        "What batches are cheaper by than --price-in and --price-out: 0.5 is half the price.",
        SERVER,
        at_least=0,
        at_most=1,
        identity=False,
    )
    judge_batch_files: str | None = option(
        None,
        "Write the requests as files of this folder, for vllm run-batch; rerun the command to collect its answers.",
        SERVER,
        metavar="DIR",
    )
    judge_cache_dir: str | None = option(
        None, "Where answers are cached (default: the user's cache).", SERVER, identity=False, metavar="DIR"
    )

    @property
    def judge_elsewhere(self) -> bool:
        """Whether another server than OpenAI's answers."""
        return bool(self.judge_base_url or self.judge_batch_files)

    def check_judge_base_url(self) -> Iterator[str]:
        yield from address_problem(flag_named(self, "judge_base_url"), self.judge_base_url)

    def check_prices(self) -> Iterator[str]:
        if (self.price_in is None) != (self.price_out is None):
            yield "--price-in and --price-out go together"
        if self.max_cost and self.price_in is None:
            yield "--max-cost needs --price-in and --price-out, dollars per million tokens"


def on_a_server(when: When, prefix: str = "--judge-") -> dict[str, dict[str, Any]]:
    """The amendment that makes the options of the server read under a condition; `prefix`: how their flags begin."""
    found = {name: {"when": when} for name in ON_A_SERVER}
    online = all_of(when, not_given("judge_batch_files", f"{prefix}batch-files"))
    found |= {name: {"when": online} for name in _ONLINE}
    found["judge_concurrency"] = {"when": all_of(online, not_given("judge_batch", f"{prefix}batch"))}
    found["judge_batch_poll"] = {"when": all_of(online, given("judge_batch", f"{prefix}batch"))}
    found["batch_discount"] = {"when": all_of(online, given("price_in"))}
    return found
