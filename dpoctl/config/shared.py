"""Options that several commands share, and the panels of the help that options are shown in."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from ..runtime import hardware
from .conditions import When, given
from .schema import option
from .scorer import parse_scorer

RUN, DATA, OPT, GEN, EVAL, LOSS = "Run", "Data", "Optimisation", "Generation", "Evaluation", "Objective"
PPO, JUDGE, SERVER, SCORING, PEOPLE = "PPO", "Judging", "Server", "Scoring", "People"
CHECK = "Checking the judge"
MANY = "Tournaments"
DEVICES, ENGINE = "Devices and memory", "Generation engine"
# the order of the panels on a help page, below the required options
PANELS = (DATA, JUDGE, MANY, CHECK, SERVER, SCORING, PEOPLE, LOSS, PPO, OPT, GEN, ENGINE, EVAL, DEVICES, RUN)
# the options that come first in their panels, in this order; the others follow as they are declared
MAIN = (
    *("model", "completions", "data", "prompts", "samples", "judgements", "reward", "source", "field", "overlong"),
    *("loss", "beta", "preset", "target_kl", "kl_coef"),
    *("lr", "batch_size", "epochs", "max_steps", "optimizer", "warmup_steps", "schedule"),
    *("n", "best_of", "temperature", "max_new_tokens"),
    *("eval_data", "eval_prompts", "ref", "eval_every", "eval_limit", "scorer"),
    *("max_length", "max_prompt_length", "limit"),
)
SIEBERT = "siebert/sentiment-roberta-large-english"
SAVE_DTYPES = ("float32", "bfloat16", "float16")

TEMPLATE_OPTIONS = ("chat_template_kwargs", "template_date", "rendered")  # of Templates

EVAL_PROMPTS: When = given("eval_prompts")
# a CPU computes deterministically in any case
OFF_CPU = When(lambda c: c.device != "cpu", lambda c: "with --device cpu", "on a GPU")


def address_problem(flag: str, address: str | None) -> Iterator[str]:
    """What is wrong with a server's address."""
    if address is not None and not address.startswith(("http://", "https://")):
        yield f"{flag} {address}: expected http://... or https://..."


def names_models(name: str) -> When:
    """With a SCORER that names models: a Python function comes from a file and a server has its own, never the Hub."""
    flag = "--" + name.replace("_", "-")

    def other(config: Any) -> str:
        spec = parse_scorer(getattr(config, name)) if getattr(config, name) else None
        if spec is None or spec.models:
            return ""
        return {"python": "python:...", "remote": "http:..."}.get(spec.kind, getattr(config, name))

    return When(
        lambda c: bool(getattr(c, name)) and not other(c),
        lambda c: f"with {flag} {other(c)}" if other(c) else f"without {flag}",
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
        "cpu, cuda or cuda:1; auto picks a GPU where there is one.",
        DEVICES,
        identity=False,
        metavar="DEVICE",
    )
    deterministic: bool = option(
        False,
        "On a GPU: use deterministic algorithms only, so that equal commands give equal bytes; slower.",
        DEVICES,
        identity=False,
        when=OFF_CPU,
    )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A command that runs a model, whose plan estimates the memory of a device."""

    plan_device: str | None = option(
        None,
        "Plan for this device, which this machine need not have: h100, a100-80gb, 4090 ..., or a GPU's memory in GB.",
        DEVICES,
        identity=False,
        metavar="NAME|GB",
        when=given("dry_run"),
    )

    def check_plan_device(self) -> Iterator[str]:
        if self.plan_device is not None and hardware.named(self.plan_device) is None:
            yield f"--plan-device {self.plan_device}: expected a number of GB, or one of {', '.join(hardware.GPUS)}"


@dataclass(frozen=True, kw_only=True)
class RunsModels(OnDevice):
    """A command that runs models, language models or scorers."""

    dtype: str = option(
        "auto",
        "Precision of all models' forward passes (trained weights stay float32); auto: bfloat16 on a GPU, else "
        "float32.",
        DEVICES,
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RunsModels):
    """A command that loads language models."""

    revision: str | None = option(None, "Branch, tag or commit of --model on the Hub.", DATA, metavar="REVISION")
    trust_remote_code: bool = option(False, "Run code that comes with a language model from the Hub.", DATA)


@dataclass(frozen=True, kw_only=True)
class Templates:
    """A command that renders chats."""

    chat_template_kwargs: str | None = option(
        None,
        'Arguments of the chat template, a JSON object such as {"enable_thinking": false}.',
        DATA,
        metavar="JSON",
    )
    template_date: str | None = option(
        None,
        "The date for chat templates that write one; by default the day on which the output is started.",
        DATA,
        metavar="YYYY-MM-DD",
    )

    rendered: str = option(
        "refuse",
        "A string that a chat template has rendered already: refuse it, or read its special tokens as text or tokens.",
        DATA,
        choices=("refuse", "text", "tokens"),
    )

    def check_chat_template_kwargs(self) -> Iterator[str]:
        try:
            found = json.loads(self.chat_template_kwargs or "{}")
        except ValueError as error:
            yield f"--chat-template-kwargs: expected a JSON object, broken JSON: {error}"
            return
        if not isinstance(found, dict):
            yield f"--chat-template-kwargs: expected a JSON object, got {self.chat_template_kwargs}"

    def check_template_date(self) -> Iterator[str]:
        try:
            date.fromisoformat(self.template_date or "2000-01-01")
        except ValueError:
            yield f"--template-date {self.template_date}: expected a date such as 2026-01-31"


@dataclass(frozen=True, kw_only=True)
class ChatTemplates(Templates):
    """A command that renders chats for a language model."""

    chat_template: str | None = option(
        None, "Chat template (Jinja) to use in place of the tokenizer's.", DATA, input="file", metavar="FILE"
    )


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
    scorer_tokens_per_batch: int = option(
        16384,
        "Most tokens in one forward pass of a scorer, padding included; affects memory and speed, scores only by "
        "rounding.",
        DEVICES,
        at_least=1,
        identity=False,
        when=names_models("scorer"),
    )
