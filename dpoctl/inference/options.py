"""Groups of options that travel together through inference; the config classes of the commands satisfy them."""

import json
from datetime import date
from pathlib import Path
from typing import Protocol

from ..data.chats import TemplateOptions
from ..outputs.claims import Output
from ..outputs.manifests import STARTED_ON


class SamplingOptions(Protocol):
    """How completions are sampled, apart from the temperature, and how many at a time."""

    @property
    def top_p(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def generation_batch_size(self) -> int: ...


class GenerationOptions(SamplingOptions, Protocol):
    """How completions are sampled at one temperature."""

    @property
    def temperature(self) -> float: ...


class EvaluationOptions(GenerationOptions, Protocol):
    """How a policy is sampled, and how many tokens a forward pass of its log-probs has."""

    @property
    def tokens_per_batch(self) -> int: ...


class ScoringOptions(Protocol):
    """What --scorer reads, and how its models are loaded from the Hub."""

    @property
    def score_text(self) -> str: ...

    @property
    def scorer_revision(self) -> str | None: ...

    @property
    def scorer_trust_remote_code(self) -> bool: ...

    @property
    def scorer_tokens_per_batch(self) -> int: ...


class TemplateArguments(Protocol):
    """How chat templates are applied."""

    @property
    def chat_template_kwargs(self) -> str | None: ...

    @property
    def template_date(self) -> str | None: ...

    @property
    def rendered(self) -> str: ...


def template_options(options: TemplateArguments, output: Output | None = None) -> TemplateOptions:
    """How a command's options say to apply chat templates; `output` keeps the date of its start."""
    template = getattr(options, "chat_template", None)

    def today() -> date:
        if options.template_date:
            return date.fromisoformat(options.template_date)
        now = date.today().isoformat()
        return date.fromisoformat(output.fix(STARTED_ON, now) if output else now)

    return TemplateOptions(
        json.loads(options.chat_template_kwargs or "{}"),
        Path(template).expanduser().read_text(encoding="utf-8") if template else None,
        options.rendered,
        today,
    )


class EngineOptions(Protocol):
    """What generates completions, and how models are loaded for it; see config/engines.py."""

    @property
    def engine(self) -> str: ...

    @property
    def engine_batch_size(self) -> int: ...

    @property
    def tensor_parallel_size(self) -> int: ...

    @property
    def gpu_memory_utilization(self) -> float: ...

    @property
    def max_model_len(self) -> int | None: ...

    @property
    def engine_arg(self) -> tuple[str, ...]: ...

    @property
    def base_url(self) -> str | None: ...

    @property
    def served_model(self) -> str | None: ...

    @property
    def concurrency(self) -> int: ...

    @property
    def timeout(self) -> float: ...

    @property
    def retries(self) -> int: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...


class SamplerOptions(SamplingOptions, EngineOptions, TemplateArguments, Protocol):
    """What the sampling commands have in common: engine, model, prompts, seed and shard."""

    @property
    def model(self) -> str: ...

    @property
    def ilql_beta(self) -> float | None: ...

    @property
    def prompts(self) -> str: ...

    @property
    def max_prompt_length(self) -> int | None: ...

    @property
    def limit(self) -> int | None: ...

    @property
    def skip_bad_rows(self) -> bool: ...

    @property
    def columns(self) -> str | None: ...

    @property
    def shard(self) -> str | None: ...

    @property
    def seed(self) -> int: ...
