"""Options of judge."""

from collections.abc import Iterator
from dataclasses import dataclass

from .conditions import When, all_of, any_of, given, not_a_file, not_given, one_of
from .judge_options import CRITERIA, JudgeOptions, on_a_server
from .judging_check import Checks
from .judging_local import LOCAL, LocalJudge
from .judging_many import TWO, Tournament
from .sampling import Rows, Sharded
from .schema import amended, option
from .shared import (
    DATA,
    JUDGE,
    OFF_CPU,
    PEOPLE,
    SCORING,
    Common,
    Planned,
    RunsModels,
    Seeded,
    Tabular,
    Templates,
    WithScorer,
    names_models,
)

_SERVER, _SCORER, _PEOPLE = (one_of("backend", name) for name in ("openai", "scorer", "human"))
_MODEL = one_of("backend", "openai", "vllm", "transformers")
_NOT_PEOPLE = one_of("backend", "openai", "vllm", "transformers", "scorer")
_COMPARED = (not_given("check"), not_given("scale"))  # two candidates, neither known to be better
_ASKED = one_of("backend", "openai", "vllm", "transformers", "human")  # a scorer is not asked a question
_COMPUTES = one_of("backend", "vllm", "transformers", "scorer")
_MODEL_SCORES = all_of(_SCORER, names_models("scorer"))
_RENDERS = When(
    lambda c: LOCAL.holds(c) or _MODEL_SCORES.holds(c), _MODEL_SCORES.unmet, f"{LOCAL.help}, or a model as --scorer"
)
_OF_MODELS = ("judge_model", "judge_max_tokens", "judge_temperature", "judge_cache_dir")
_SERVER_FLAGS = (
    *("model", "base_url", "concurrency", "timeout", "retries", "max_tokens", "cache_dir"),
    *("batch", "batch_poll", "batch_files"),
    *("verdict", "answer_format", "reasoning_effort", "extra_body"),
)
_MODEL_HELP = (
    "The judge: a name on the server, for example gpt-5.2 or gpt-5-mini; with --backend vllm or transformers a "
    "directory or hub id."
)


def _of_server() -> dict[str, dict]:
    """The options of the server, of which this command has no others with the short names."""
    found = on_a_server(_SERVER, "--")
    for name in _OF_MODELS:
        found[name] |= {"when": _MODEL, "panel": JUDGE}
    found["judge_model"] |= {"help": _MODEL_HELP, "input": "model", "input_when": LOCAL, "metavar": "NAME|MODEL"}
    for name in _SERVER_FLAGS:
        found[f"judge_{name}"]["flag"] = "--" + name.replace("_", "-")
    for name, when in (("verdict", _MODEL), ("answer_format", _SERVER)):
        found[f"judge_{name}"]["when"] = all_of(when, not_given("scale"))
    return found


@amended(
    **_of_server(),
    prompt_noun={"when": all_of(_ASKED, not_a_file("criterion", CRITERIA))},
    order={"when": all_of(_NOT_PEOPLE, *_COMPARED)},
    device={"when": _COMPUTES},
    deterministic={"when": all_of(one_of("backend", "transformers", "scorer"), OFF_CPU)},
    dtype={"when": _RENDERS},
    plan_device={"panel": SCORING, "when": all_of(_SCORER, given("dry_run"))},
    score_text={"panel": SCORING, "when": _SCORER},
    scorer_revision={"panel": SCORING, "when": _MODEL_SCORES},
    scorer_trust_remote_code={"panel": SCORING, "when": _MODEL_SCORES},
    scorer_tokens_per_batch={"panel": SCORING, "when": _MODEL_SCORES},
    **dict.fromkeys(("chat_template_kwargs", "template_date"), {"when": _RENDERS}),
    rendered={"panel": SCORING, "when": _MODEL_SCORES},
    shard={"when": _NOT_PEOPLE},
    rank_timeout={"when": all_of(_NOT_PEOPLE, not_given("shard"))},
    seed={"when": any_of(_ASKED, one_of("order", "random"), given("compare"), given("check"))},
    json={"when": any_of(not_given("form"), given("dry_run"))},
)
@dataclass(frozen=True, kw_only=True)
class Judge(
    Checks,
    Tabular,
    Tournament,
    JudgeOptions,
    LocalJudge,
    Sharded,
    Planned,
    Rows,
    WithScorer,
    Templates,
    RunsModels,
    Seeded,
    Common,
):
    candidates: tuple[str, ...] = option(
        help="Completions files A and B; with A alone, B is the `reference` of its rows; more are a tournament.",
        panel=DATA,
        argument=True,
        input="file",
        metavar="A.jsonl [B.jsonl ...]",
    )
    backend: str = option(
        "openai",
        "Who decides: a chat-completions server (OpenAI, vLLM, llama.cpp, ...), a model in this process by vLLM or "
        "transformers, a SCORER, or people.",
        JUDGE,
        choices=("openai", "vllm", "transformers", "scorer", "human"),
    )
    limit: int | None = option(
        None,
        "Judge only the first N comparisons; in a tournament all those of the first N prompts.",
        DATA,
        at_least=1,
        when=not_given("add"),
    )
    scale: bool = option(
        False,
        "Give each completion of A, and of B, a score of 1 to 10 instead of comparing them.",
        JUDGE,
        when=all_of(_MODEL, not_given("check")),
    )
    within: bool = option(
        False,
        "Compare the samples of each prompt in A with each other, for make-prefs --judgements.",
        JUDGE,
        when=all_of(*_COMPARED),
    )
    canary: str | None = option(
        None,
        "Also judge this fixed text as A; a judge that lets it win cannot be trusted.",
        JUDGE,
        when=all_of(_NOT_PEOPLE, not_given("within"), not_given("check"), TWO),
    )
    compare: str | None = option(
        None,
        "Judgements of another policy on the same prompts: paired bootstrap of the difference.",
        JUDGE,
        input="file",
        when=all_of(not_given("form"), not_given("within"), *_COMPARED, TWO),
    )
    against: str | None = option(
        None,
        "Judgements of another judge on the same comparisons: agreement and Cohen's kappa.",
        JUDGE,
        input="file",
        when=all_of(not_given("form"), *_COMPARED),
    )
    scorer: str | None = option(
        None, "What scores A and B; the higher score wins.", SCORING, input="scorer", when=_SCORER
    )
    form: str | None = option(
        None, "Write the blinded HTML form to this file.", PEOPLE, identity=False, metavar="FILE", when=_PEOPLE
    )
    annotators: int | None = option(
        None,
        "Write a form for each of N people, who share the comparisons: FILE-1.html, FILE-2.html, ...",
        PEOPLE,
        at_least=2,
        identity=False,
        when=given("form"),
    )
    overlap: float = option(
        0.2,
        "Share of the comparisons that all annotators answer, for their agreement.",
        PEOPLE,
        at_least=0,
        at_most=1,
        identity=False,
        when=all_of(given("form"), given("annotators")),
    )
    answers: tuple[str, ...] = option(
        (),
        "Answers exported from the form; may be given several times, once per person.",
        PEOPLE,
        input="file",
        when=_PEOPLE,
    )

    @property
    def is_tournament(self) -> bool:
        """Whether judgements name their candidates and are summarised as scores."""
        return not (self.scale or self.check) and (len(self.candidates) > 2 or bool(self.baseline) or self.add)

    def check_candidates(self) -> Iterator[str]:
        if self.within and len(self.candidates) > 1:
            yield "--within compares the samples of one file: give A alone"

    def check_backend(self) -> Iterator[str]:
        needs = {
            **dict.fromkeys(("openai", "vllm", "transformers"), ("--model", self.judge_model)),
            "scorer": ("--scorer", self.scorer),
            "human": ("--form or --answers", self.form or self.answers),
        }
        flag, value = needs[self.backend]
        if not value:
            yield f"{flag} is required with --backend {self.backend}"

    def check_people(self) -> Iterator[str]:
        if self.form and self.answers:
            yield "--form writes the form and --answers reads what people answered: use one of them"
