"""Options of judge."""

from collections.abc import Iterator
from dataclasses import dataclass

from .conditions import all_of, any_of, given, not_a_file, not_given, one_of
from .sampling import Rows, Sharded
from .schema import NAME_OR_FILE, amended, option
from .shared import (
    DATA,
    JUDGE,
    OFF_CPU,
    PEOPLE,
    SCORING,
    SERVER,
    TEMPLATE_OPTIONS,
    Common,
    Planned,
    RunsModels,
    Seeded,
    Tabular,
    Templates,
    WithScorer,
    names_models,
)

CRITERIA = ("summary-s", "summary-c", "helpful", "sentiment")
_SERVER, _SCORER, _PEOPLE = (one_of("backend", name) for name in ("openai", "scorer", "human"))
_NOT_PEOPLE = one_of("backend", "openai", "scorer")
_ASKED = one_of("backend", "openai", "human")  # a scorer is not asked a question


@amended(
    device={"panel": SCORING, "when": _SCORER},
    deterministic={"panel": SCORING, "when": all_of(_SCORER, OFF_CPU)},
    dtype={"panel": SCORING, "when": all_of(_SCORER, names_models("scorer"))},
    plan_device={"panel": SCORING, "when": all_of(_SCORER, given("dry_run"))},
    score_text={"panel": SCORING, "when": _SCORER},
    scorer_revision={"panel": SCORING, "when": all_of(_SCORER, names_models("scorer"))},
    scorer_trust_remote_code={"panel": SCORING, "when": all_of(_SCORER, names_models("scorer"))},
    scorer_tokens_per_batch={"panel": SCORING, "when": all_of(_SCORER, names_models("scorer"))},
    **dict.fromkeys(TEMPLATE_OPTIONS, {"panel": SCORING, "when": all_of(_SCORER, names_models("scorer"))}),
    shard={"when": _NOT_PEOPLE},
    rank_timeout={"when": all_of(_NOT_PEOPLE, not_given("shard"))},
    seed={"when": any_of(_ASKED, one_of("order", "random"), given("compare"))},
    json={"when": any_of(not_given("form"), given("dry_run"))},
)
@dataclass(frozen=True, kw_only=True)
class Judge(Tabular, Sharded, Planned, Rows, WithScorer, Templates, RunsModels, Seeded, Common):
    candidates: tuple[str, ...] = option(
        help="Completions files A and B; with A alone, B is the `reference` of its rows.",
        panel=DATA,
        argument=True,
        input="file",
        metavar="A.jsonl [B.jsonl]",
    )
    backend: str = option(
        "openai",
        "Who decides: a chat-completions server (OpenAI, vLLM, llama.cpp, ...), a SCORER, or people.",
        JUDGE,
        choices=("openai", "scorer", "human"),
    )
    criterion: str = option(
        "helpful",
        "What the judge decides by: summary-s (simple), summary-c (concise; the paper's main prompt), helpful, "
        "sentiment, or a template file; see dpoctl docs judging.",
        JUDGE,
        input=NAME_OR_FILE,
    )
    prompt_noun: str | None = option(
        None,
        "Noun for the prompt in the judge's question, such as 'news article' for cnn-dm.",
        JUDGE,
        when=all_of(_ASKED, not_a_file("criterion", CRITERIA)),
    )
    order: str = option(
        "both",
        "Show A and B in both orders (a win counts if both answers agree), or in a random one.",
        JUDGE,
        choices=("both", "random"),
        when=_NOT_PEOPLE,
    )
    limit: int | None = option(None, "Judge only the first N comparisons.", DATA, at_least=1)
    canary: str | None = option(
        None, "Also judge this fixed text as A; a judge that lets it win cannot be trusted.", JUDGE, when=_NOT_PEOPLE
    )
    compare: str | None = option(
        None,
        "Judgements of another policy on the same prompts: paired bootstrap of the difference.",
        JUDGE,
        input="file",
        when=not_given("form"),
    )
    against: str | None = option(
        None,
        "Judgements of another judge on the same comparisons: agreement and Cohen's kappa.",
        JUDGE,
        input="file",
        when=not_given("form"),
    )
    scorer: str | None = option(
        None, "What scores A and B; the higher score wins.", SCORING, input="scorer", when=_SCORER
    )
    model: str | None = option(
        None, "Name of the judge model on the server, for example gpt-5.2 or gpt-5-mini.", SERVER, when=_SERVER
    )
    base_url: str | None = option(
        None, "Server other than OpenAI's, such as http://localhost:8000/v1.", SERVER, metavar="URL", when=_SERVER
    )
    concurrency: int = option(8, "Requests in flight.", SERVER, at_least=1, identity=False, when=_SERVER)
    timeout: float = option(60.0, "Seconds to wait for an answer.", SERVER, above=0, identity=False, when=_SERVER)
    retries: int = option(
        6,
        "Retries after transient failures (exponential backoff, or what the server asks for).",
        SERVER,
        at_least=0,
        identity=False,
        when=_SERVER,
    )
    max_tokens: int = option(
        1024, "Longest answer of the judge in tokens, including hidden reasoning.", SERVER, at_least=8, when=_SERVER
    )
    judge_temperature: float | None = option(
        None,
        "Temperature of the judge (default: 0 with --base-url, else the model's own).",
        SERVER,
        at_least=0,
        when=_SERVER,
    )
    price_in: float | None = option(
        None, "US dollars per million prompt tokens.", SERVER, at_least=0, identity=False, when=_SERVER
    )
    price_out: float | None = option(
        None, "US dollars per million completion tokens.", SERVER, at_least=0, identity=False, when=_SERVER
    )
    max_cost: float | None = option(
        None,
        "Stop before the answers cost more than X US dollars, earlier runs of the command included.",
        SERVER,
        above=0,
        identity=False,
        when=_SERVER,
    )
    cache_dir: str | None = option(
        None,
        "Where answers are cached (default: the user's cache).",
        SERVER,
        identity=False,
        metavar="DIR",
        when=_SERVER,
    )
    form: str | None = option(
        None, "Write the blinded HTML form to this file.", PEOPLE, identity=False, metavar="FILE", when=_PEOPLE
    )
    answers: tuple[str, ...] = option(
        (),
        "Answers exported from the form; may be given several times, once per person.",
        PEOPLE,
        input="file",
        when=_PEOPLE,
    )

    def check_candidates(self) -> Iterator[str]:
        if len(self.candidates) > 2:
            yield f"expected one or two completions files, got {len(self.candidates)}"

    def check_backend(self) -> Iterator[str]:
        needs = {
            "openai": ("--model", self.model),
            "scorer": ("--scorer", self.scorer),
            "human": ("--form or --answers", self.form or self.answers),
        }
        flag, value = needs[self.backend]
        if not value:
            yield f"{flag} is required with --backend {self.backend}"

    def check_prices(self) -> Iterator[str]:
        if (self.price_in is None) != (self.price_out is None):
            yield "--price-in and --price-out go together"
        if self.max_cost and self.price_in is None:
            yield "--max-cost needs --price-in and --price-out, dollars per million tokens"

    def check_base_url(self) -> Iterator[str]:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            yield f"--base-url {self.base_url}: expected http://... or https://..."

    def check_people(self) -> Iterator[str]:
        if self.form and self.answers:
            yield "--form writes the form and --answers reads what people answered: use one of them"
