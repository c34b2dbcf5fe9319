"""Options of make-prefs: where samples come from, and what decides their pairs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .conditions import When, all_of, any_of, given, not_a_file, not_given, one_of
from .engines import LOCAL, Engines
from .judge_options import CRITERIA, JudgeOptions, on_a_server
from .sampling import HERE, Generation, Prompted, Rows, Sharded, WithValues, generation_when
from .schema import amended, option
from .shared import (
    DATA,
    GEN,
    JUDGE,
    OFF_CPU,
    SIEBERT,
    TEMPLATE_OPTIONS,
    ChatTemplates,
    Common,
    ModelOptions,
    Planned,
    Seeded,
    WithScorer,
    names_models,
)

SAMPLES = replace(all_of(not_given("samples"), not_given("judgements")), help="where a model is sampled")
BY_SCORES = (not_given("judge"), not_given("judgements"))
ASKS = one_of("judge", "openai")


def _why_no_scorer(config: Any) -> str:
    if config.judgements:
        return "with --judgements"
    return f"with --judge {config.judge}" if config.judge == "openai" else "without --scorer"


MAY_SCORE = When(
    lambda c: not c.judgements and c.judge != "openai", _why_no_scorer, "unless --judge openai or --judgements decides"
)
SCORES = When(lambda c: bool(c.scorer) and MAY_SCORE.holds(c), _why_no_scorer, "where a scorer decides")
_OF_POLICY = ("engine", "chat_template", "max_prompt_length", "revision", "trust_remote_code")
_OF_LOCAL_POLICY = ("generation_batch_size", "ilql_beta")
_MODEL_SCORES = replace(all_of(MAY_SCORE, names_models("scorer")), help="with a model as --scorer")
COMPUTES = any_of(all_of(SAMPLES, HERE), _MODEL_SCORES)


def _judge_options() -> dict[str, dict[str, Any]]:
    """The options of the judge's server, told apart from those of an engine."""
    found = on_a_server(ASKS)
    for name, text in (
        ("concurrency", "Requests to the judge in flight."),
        ("timeout", "Seconds to wait for an answer of the judge."),
        ("retries", "Retries of a request to the judge after transient failures."),
        ("cache_dir", "Where answers of the judge are cached (default: the user's cache)."),
        ("batch_poll", "Seconds between two looks at the judge's batches."),
    ):
        found[f"judge_{name}"]["help"] = text
    return found


@amended(
    **(generation_when(SAMPLES) | dict.fromkeys(_OF_LOCAL_POLICY, {"when": all_of(SAMPLES, LOCAL)})),
    **_judge_options(),
    **dict.fromkeys(TEMPLATE_OPTIONS, {"when": any_of(SAMPLES, names_models("scorer"))}),
    **dict.fromkeys(_OF_POLICY, {"when": SAMPLES}),
    **dict.fromkeys(("device", "dtype"), {"when": COMPUTES}),
    deterministic={"when": all_of(OFF_CPU, any_of(all_of(SAMPLES, LOCAL), _MODEL_SCORES))},
    plan_device={"when": all_of(given("dry_run"), COMPUTES)},
    score_text={"when": SCORES},
    seed={"when": any_of(SAMPLES, one_of("pairs", "random"), ASKS)},
    criterion={"when": ASKS},
    prompt_noun={"when": all_of(ASKS, not_a_file("criterion", CRITERIA))},
    order={"when": ASKS},
)
@dataclass(frozen=True, kw_only=True)
class MakePrefs(
    JudgeOptions,
    Sharded,
    Planned,
    Prompted,
    Rows,
    WithScorer,
    Engines,
    WithValues,
    Generation,
    ChatTemplates,
    ModelOptions,
    Seeded,
    Common,
):
    model: str | None = option(None, "Model that is sampled, usually the SFT model.", DATA, input="model", when=SAMPLES)
    prompts: str | None = option(None, "Prompt rows, or preferences.", DATA, input="file", when=SAMPLES)
    samples: tuple[str, ...] = option(
        (),
        "Samples that exist already, in place of a model and prompts; may be given several times.",
        DATA,
        input="file",
    )
    scorer: str | None = option(
        None,
        f"What scores the completions (default: {SIEBERT} where a model is sampled, the `score` of the rows of "
        "--samples).",
        DATA,
        input="scorer",
        when=MAY_SCORE,
    )
    judge: str | None = option(
        None,
        "Decide pairs by a judge in place of scores: a chat-completions server, or --scorer in both orders.",
        JUDGE,
        choices=("openai", "scorer"),
    )
    judgements: tuple[str, ...] = option(
        (),
        "Judgements of dpoctl judge that decide the pairs; several files vote, as do the people in one.",
        DATA,
        input="file",
    )
    completions: int = option(4, "Completions per prompt.", GEN, at_least=2, when=SAMPLES)
    pairs: str = option(
        "all",
        "Which pairs of a prompt's completions to keep.",
        DATA,
        choices=("all", "best-worst", "random"),
        when=not_given("unpaired"),
    )
    min_margin: float = option(
        0.0,
        "Drop pairs whose scores differ by less.",
        DATA,
        at_least=0,
        when=all_of(not_given("unpaired"), *BY_SCORES),
    )
    unpaired: bool = option(
        False,
        "Write single completions with a `label` in place of pairs: true for those that beat more of their prompt's "
        "other samples than beat them.",
        DATA,
    )
    threshold: float | None = option(
        None,
        "Label by the score instead: true where it is at least this.",
        DATA,
        when=all_of(given("unpaired"), *BY_SCORES),
    )
    completions_out: str | None = option(
        None,
        "Also write the completions, with their scores, to this .jsonl file.",
        DATA,
        identity=False,
        metavar="FILE",
        when=not_given("judgements"),
    )
    limit: int | None = option(None, "Use only the first N prompts.", DATA, at_least=1)

    def derived(self) -> dict[str, Any]:
        """Defaults that depend on other options."""
        sampled_and_scored = not (self.samples or self.judgements or self.judge)
        return {"scorer": SIEBERT} if sampled_and_scored else {}

    def check_source(self) -> Iterator[str]:
        if not self.samples and not self.judgements:
            for flag, value in (("--model", self.model), ("--prompts", self.prompts)):
                if not value:
                    yield f"{flag} is required without --samples and --judgements"

    def check_judge(self) -> Iterator[str]:
        if self.judge and self.judgements:
            yield "--judge asks a judge and --judgements reads what judges have said: use one of them"
        needs = {"openai": ("--judge-model", self.judge_model), "scorer": ("--scorer", self.scorer)}
        flag, value = needs.get(self.judge or "", ("", True))
        if not value:
            yield f"{flag} is required with --judge {self.judge}"

    def check_temperature(self) -> Iterator[str]:
        if self.temperature == 0:
            yield "--temperature 0 makes a prompt's completions equal, which gives no pairs"

    def check_outputs(self) -> Iterator[str]:
        if self.completions_out and self.completions_out == self.out:
            yield "--completions-out and --out name the same file"
        if self.completions_out and self.completions_out in (self.prompts, *self.samples):
            yield f"--completions-out {self.completions_out} is also an input of this command"
