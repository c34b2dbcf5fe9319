"""Options that several commands share, and the panels of the help that options are shown in."""

from dataclasses import dataclass
from typing import Any

from .conditions import When, given
from .schema import option
from .scorer import parse_scorer

RUN, DATA, OPT, GEN, EVAL, LOSS = "Run", "Data", "Optimisation", "Generation", "Evaluation", "Objective"
PPO, JUDGE, SERVER, SCORING, PEOPLE = "PPO", "Judging", "Server", "Scoring", "People"
DEVICES = "Devices and memory"
# the order of the panels on a help page, below the required options
PANELS = (DATA, JUDGE, SERVER, SCORING, PEOPLE, LOSS, PPO, OPT, GEN, EVAL, DEVICES, RUN)
# the options that come first in their panels, in this order; the others follow as they are declared
MAIN = (
    *("model", "completions", "data", "prompts", "reward", "source", "field", "overlong"),
    *("loss", "beta", "preset", "target_kl", "kl_coef"),
    *("lr", "batch_size", "epochs", "max_steps", "optimizer", "warmup_steps", "schedule"),
    *("n", "best_of", "temperature", "max_new_tokens"),
    *("eval_data", "eval_prompts", "ref", "eval_every", "eval_limit", "scorer"),
    *("max_length", "max_prompt_length", "limit"),
)
SIEBERT = "siebert/sentiment-roberta-large-english"
SAVE_DTYPES = ("float32", "bfloat16", "float16")

EVAL_PROMPTS: When = given("eval_prompts")


def names_models(name: str) -> When:
    """With a SCORER that names models: a Python function comes from a file, never from the Hub."""
    flag = "--" + name.replace("_", "-")

    def is_python(config: Any) -> bool:
        return bool(getattr(config, name)) and parse_scorer(getattr(config, name)).kind == "python"

    return When(
        lambda c: bool(getattr(c, name)) and not is_python(c),
        lambda c: f"with {flag} python:..." if is_python(c) else f"without {flag}",
        f"with a model as {flag}",
    )


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command has."""

    out: str = option(help="Directory to write.", panel=RUN, identity=False, metavar="DIR")
    overwrite: bool = option(False, "Replace an existing output.", RUN, identity=False)
    dry_run: bool = option(False, "Print the plan and its estimated cost, then exit.", RUN, identity=False)


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """A command that draws random numbers."""

    seed: int = option(0, "Random seed.", RUN, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Tabular:
    """A command that ends in a table on stdout."""

    json: bool = option(False, "Print one JSON object on stdout instead of the table or plan.", RUN, identity=False)


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """A command that computes on a device."""

    device: str = option(
        "auto",
        "cpu, cuda, cuda:1 or mps; auto picks a GPU where there is one.",
        DEVICES,
        identity=False,
        metavar="DEVICE",
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OnDevice):
    """A command that loads language models."""

    dtype: str = option(
        "auto",
        "Precision of computation (weights stay float32); auto: bfloat16 on a GPU, else float32; scorers: float32.",
        DEVICES,
        choices=("auto", "float32", "bfloat16"),
    )
    revision: str | None = option(None, "Branch, tag or commit of --model on the Hub.", DATA, metavar="REVISION")
    trust_remote_code: bool = option(False, "Run code that comes with a language model from the Hub.", DATA)


@dataclass(frozen=True, kw_only=True)
class WithScorer:
    """A command that loads a scorer."""

    score_text: str = option(
        "joined", "Score prompt and completion joined, or the completion alone.", EVAL, choices=("joined", "completion")
    )
    scorer_revision: str | None = option(
        None, "Branch, tag or commit of --scorer on the Hub.", EVAL, metavar="REVISION", when=names_models("scorer")
    )
    scorer_trust_remote_code: bool = option(
        False, "Run code that comes with a scorer from the Hub.", EVAL, when=names_models("scorer")
    )
