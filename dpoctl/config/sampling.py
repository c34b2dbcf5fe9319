"""Options of the commands that sample or score: make-prefs, sample, score, evaluate."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..data.columns import NOTATION, parse_columns
from ..errors import InputError
from .conditions import When, all_of, any_of, given, not_given, one_of
from .engines import LOCAL, Engines
from .schema import amended, option
from .shared import (
    DATA,
    DEVICES,
    EVAL,
    GEN,
    OFF_CPU,
    RUN,
    SIEBERT,
    TEMPLATE_OPTIONS,
    ChatTemplates,
    Common,
    ModelOptions,
    Planned,
    RunsModels,
    Seeded,
    Tabular,
    Templates,
    WithScorer,
    names_models,
)


def _is_random(config: Any) -> bool:
    temperature = config.temperature
    return any(temperature) if isinstance(temperature, tuple) else temperature > 0


RANDOM = When(_is_random, lambda c: "with --temperature 0", "with --temperature above 0")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How completions are sampled."""

    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.", GEN, at_least=0)
    top_p: float = option(
        1.0, "Keep the smallest set of tokens with this total probability.", GEN, above=0, at_most=1, when=RANDOM
    )
    top_k: int = option(0, "Keep the k most probable tokens; 0 keeps all.", GEN, at_least=0, when=RANDOM)
    max_new_tokens: int = option(64, "Longest completion, in tokens.", GEN, at_least=1)
    generation_batch_size: int = option(
        256,
        "Completions generated in one batch; changes rounding, so that a sampled token may differ.",
        GEN,
        at_least=1,
    )


def generation_when(when: When) -> dict[str, dict[str, When]]:
    """The amendment that makes all generation options read under a condition."""
    conditions = dict.fromkeys(("temperature", "max_new_tokens", "generation_batch_size"), when)
    conditions |= dict.fromkeys(("top_p", "top_k"), all_of(when, RANDOM))
    return {name: {"when": condition} for name, condition in conditions.items()}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A command that reads rows."""

    skip_bad_rows: bool = option(False, "Skip invalid rows and count them, instead of refusing the file.", DATA)
    columns: str | None = option(
        None,
        "Columns that hold the fields, such as prompt=question,chosen=good; prompt=context+question joins two.",
        DATA,
        metavar=NOTATION,
    )

    def check_columns(self) -> Iterator[str]:
        try:
            parse_columns(self.columns)
        except InputError as e:
            yield f"{e.message} ({e.hint})"


@dataclass(frozen=True, kw_only=True)
class WithValues:
    """A command that samples from one model, which may be one of train-ilql."""

    ilql_beta: float | None = option(
        None,
        "Decode a model of train-ilql by log pi + B (Q - V); 0, the default, is the policy without its values.",
        GEN,
        at_least=0,
        at_most=10000,
        metavar="B",
        when=LOCAL,
    )


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A command that samples from prompts."""

    max_prompt_length: int | None = option(
        None,
        "Longest prompt in tokens, examples included; longer ones are truncated from the left (default: only those "
        "that the model's context cannot hold, to half of it).",
        DATA,
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A row output that several jobs, or the ranks of torchrun, can share; `dpoctl merge` joins the shards."""

    out: str = option(help="JSONL file to write.", panel=RUN, identity=False, metavar="FILE")
    shard: str | None = option(
        None, "Write only shard I of N, such as 1/4; dpoctl merge joins the shards.", RUN, metavar="I/N"
    )
    rank_timeout: float = option(
        60.0,
        "Under torchrun: stop after this many minutes without progress in another rank's shard.",
        DEVICES,
        above=0,
        identity=False,
        when=not_given("shard"),
    )

    def check_shard(self) -> Iterator[str]:
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", "1/1" if self.shard is None else self.shard)
        if not found or int(found[1]) > int(found[2]):
            yield f"--shard {self.shard}: expected I/N with I from 1 to N, such as 1/4"


HERE = one_of("engine", "transformers", "vllm")  # the policy is held by this command
_SCORES = names_models("scorer")
# where a server generates, only a scorer is run here; --deterministic concerns what this package computes
ENGINE_CONDITIONS = {
    "generation_batch_size": {"when": LOCAL},
    "device": {"when": any_of(HERE, _SCORES)},
    "dtype": {"when": any_of(HERE, _SCORES)},
    "deterministic": {"when": all_of(OFF_CPU, any_of(LOCAL, _SCORES))},
}


@amended(
    **ENGINE_CONDITIONS,
    seed={"when": RANDOM},
    score_text={"when": given("best_of"), "panel": GEN},
    scorer_revision={"panel": GEN},
    scorer_trust_remote_code={"panel": GEN},
)
@dataclass(frozen=True, kw_only=True)
class Sample(
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
    model: str = option(help="Model to sample from.", panel=DATA, input="model")
    prompts: str = option(help="Prompt rows, or preferences.", panel=DATA, input="file")
    temperature: tuple[float, ...] = option(  # type: ignore[assignment]  # one in the other commands
        (1.0,),
        "Sampling temperature, 0 is greedy; several, separated by commas, go to one file.",
        GEN,
        at_least=0,
        commas=True,
    )
    few_shot: str | None = option(
        None, "Rows with prompt and completion, put before every prompt as examples.", DATA, input="file"
    )
    n: int = option(1, "Completions per prompt.", GEN, at_least=1)
    best_of: int | None = option(
        None, "Sample N completions per prompt and keep the one with the highest score.", GEN, at_least=2
    )
    scorer: str | None = option(None, "What --best-of selects by.", GEN, input="scorer")
    stop: tuple[str, ...] = option((), "Text that ends a completion; may be given several times.", GEN)
    limit: int | None = option(None, "Use only the first N prompts.", DATA, at_least=1)

    def check_best_of(self) -> Iterator[str]:
        if (self.best_of is None) != (self.scorer is None):
            yield "--best-of and --scorer go together: --best-of samples N completions, --scorer selects one"
        if self.best_of and self.n != 1:
            yield "--best-of keeps one completion per prompt, so --n cannot be combined with it"
        if self.best_of and 0 in self.temperature:
            yield "--temperature 0 makes a prompt's completions equal: there is nothing to select"

    def check_temperatures(self) -> Iterator[str]:
        if len(set(self.temperature)) < len(self.temperature) or not self.temperature:
            yield "--temperature names one temperature twice, or none"


@amended(**dict.fromkeys(TEMPLATE_OPTIONS, {"when": names_models("scorer")}))
@dataclass(frozen=True, kw_only=True)
class Score(Sharded, Planned, Rows, WithScorer, Templates, RunsModels, Common):
    data: str = option(
        help="Rows with text: completions, texts or messages; of preferences both sides are scored.",
        panel=DATA,
        input="file",
    )
    scorer: str = option(help="What scores the rows.", panel=DATA, input="scorer")
    by: str | None = option(
        None,
        "Of preferences: also tell the accuracy for each value of this column, such as subset.",
        EVAL,
        metavar="COLUMN",
    )


# Without --prompts nothing is sampled: --model is the policy that sampled --completions.
_SAMPLING = all_of(given("model"), given("prompts"))
_SCORING = replace(
    any_of(names_models("scorer"), names_models("selection_scorer")),
    help="with models as --scorer or --selection-scorer",
)


@amended(
    **(generation_when(_SAMPLING) | {"generation_batch_size": {"when": all_of(_SAMPLING, LOCAL)}}),
    engine={"when": _SAMPLING},
    seed={"when": all_of(_SAMPLING, RANDOM)},
    max_prompt_length={"when": _SAMPLING},
    scorer_trust_remote_code={"when": _SCORING},
    scorer_tokens_per_batch={"when": _SCORING},
    revision={"when": given("model")},
    dtype={
        "when": any_of(
            *(given(name) for name in ("model", "ref", "lm")), names_models("scorer"), names_models("selection_scorer")
        )
    },
    rank_timeout={"help": "Under torchrun: stop after this many minutes without an answer from another rank."},
    trust_remote_code={"when": any_of(given("model"), given("ref"), given("lm"))},
)
@dataclass(frozen=True, kw_only=True)
class Evaluate(
    Tabular,
    Sharded,
    Planned,
    Prompted,
    Rows,
    WithScorer,
    Engines,
    Generation,
    ChatTemplates,
    ModelOptions,
    Seeded,
    Common,
):
    model: tuple[str, ...] = option(
        (),
        "Model to sample from and evaluate; may be given several times. With --completions and without --prompts: the "
        "model that sampled them.",
        DATA,
        input="model",
    )
    completions: tuple[str, ...] = option(
        (),
        "Completions file to evaluate; may be given several times. There is a KL where --model sampled it and its rows "
        "carry their token ids.",
        DATA,
        input="file",
    )
    ref: str | None = option(None, "Reference model for the KL and the perplexity.", DATA, input="model")
    ref_revision: str | None = option(
        None, "Branch, tag or commit of --ref on the Hub.", DATA, metavar="REVISION", when=given("ref")
    )
    ilql_beta: tuple[float, ...] = option(
        (),
        "Decode models of train-ilql by log pi + B (Q - V); several, separated by commas: a row for each.",
        GEN,
        at_least=0,
        at_most=10000,
        commas=True,
        metavar="B,...",
        when=all_of(given("model"), LOCAL),
    )
    prompts: str | None = option(
        None, "Prompts for the models to sample from, unseen in training.", DATA, input="file", when=given("model")
    )
    scorer: str = option(SIEBERT, "What scores the completions.", EVAL, input="scorer")
    lm: str | None = option(None, "Another language model to measure perplexity with.", EVAL, input="model")
    lm_revision: str | None = option(
        None, "Branch, tag or commit of --lm on the Hub.", EVAL, metavar="REVISION", when=given("lm")
    )
    selection_scorer: str | None = option(
        None,
        "Add the best-of-n curve of each --completions file: this scorer selects, --scorer gives the reward.",
        EVAL,
        input="scorer",
        when=given("completions"),
    )
    selection_scorer_revision: str | None = option(
        None,
        "Branch, tag or commit of --selection-scorer on the Hub.",
        EVAL,
        metavar="REVISION",
        when=all_of(given("completions"), names_models("selection_scorer")),
    )
    optimum: bool = option(
        False,
        "Add the exact KL-constrained optimum, from --completions that are samples of the reference.",
        EVAL,
        when=given("completions"),
    )
    n: int = option(1, "Completions per prompt.", GEN, at_least=1, when=_SAMPLING)
    limit: int | None = option(None, "Use only the first N prompts.", DATA, at_least=1, when=_SAMPLING)
    tokens_per_batch: int = option(
        8192,
        "Most tokens in one forward pass; affects memory and speed, results only by rounding.",
        DEVICES,
        at_least=1,
        identity=False,
        when=any_of(given("model"), given("ref"), given("lm")),
    )

    def check_subjects(self) -> Iterator[str]:
        if not self.model and not self.completions:
            yield "--model or --completions is required (what to evaluate)"

    @property
    def sampled_by(self) -> str | None:
        """The model that sampled --completions, where no model is sampled here."""
        return self.model[0] if self.model and self.completions and not self.prompts else None

    def check_ilql_beta(self) -> Iterator[str]:
        if len(set(self.ilql_beta)) < len(self.ilql_beta):
            yield "--ilql-beta names one value twice"
        if self.sampled_by and len(self.ilql_beta) > 1:
            yield "several --ilql-beta need --prompts to sample from; --completions were decoded with one"

    def check_model(self) -> Iterator[str]:
        if self.model and not self.completions and not (self.prompts and self.ref):
            yield "--prompts and --ref are required with --model"
        elif self.model and not self.ref:
            yield "--ref is required with --model: it is the reference of the KL"
        if self.sampled_by and len(self.model) > 1:
            yield "several --model need --prompts to sample from; without it, --model is what sampled --completions"

    def check_served(self) -> Iterator[str]:
        if self.engine == "server" and len(set(self.model)) > 1:
            yield "--engine server samples the one model that is served: give one --model, evaluate the others apart"
