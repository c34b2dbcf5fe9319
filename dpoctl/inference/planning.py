"""What --dry-run prints for the commands that sample or score: rows, tokens, FLOPs, and the memory of one device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from .. import log
from ..data.readers import load_rows
from ..models import ledger
from ..models.ledger import Ledger
from ..models.load import context_length, count_weights
from ..models.tokenizers import load_codec
from . import memory
from .engine_planning import engine_lines, engine_phases
from .fitting import lines_of
from .generate import batch_slices
from .memory import Batch, Phase
from .options import SamplerOptions, template_options
from .sampler import divide, with_examples
from .values import count_values


class PlannedSampling(SamplerOptions, Protocol):
    """What the plan of a sampling command reads beside what sampling reads."""

    @property
    def plan_device(self) -> str | None: ...

    @property
    def scorer(self) -> str | None: ...

    @property
    def scorer_revision(self) -> str | None: ...

    @property
    def scorer_tokens_per_batch(self) -> int: ...


class RowPlan(ABC):
    """The plan of a command that runs models and writes rows; `config` is that of the command."""

    def __init__(self, config: Any):
        self.config, self.target = config, memory.target_of(config)

    @abstractmethod
    def phases_of(self, config: Any, counted: Ledger) -> list[Phase]:
        """The phases, of models of fake tensors."""

    def phases(self, config: Any) -> list[Phase]:
        """The phases of the command with these options, in order."""
        with log.silenced(), ledger.planning(gpu=self.target.gpu) as counted:
            return self.phases_of(config, counted)

    def memory_lines(self) -> dict[str, Any]:
        """The lines that concern memory."""
        return lines_of(self.config, self.target, self.phases)

    def open_scorer(self, config: Any, counted: Ledger, option: str = "scorer") -> memory.PlannedScorer:
        """The models of the SCORER that an option of the config names, if there is one."""
        tokens = config.scorer_tokens_per_batch
        if (scorer := getattr(config, option)) is None:
            return memory.PlannedScorer([], self.target, tokens)
        return memory.open_scorer(counted, scorer, getattr(config, f"{option}_revision"), self.target, tokens)


class SamplingPlan(RowPlan):
    """Completions of prompts, `n` each at each temperature, which a scorer may read afterwards."""

    config: PlannedSampling

    def __init__(self, config: PlannedSampling, n: int, temperatures: Sequence[float], few_shot: str | None = None):
        super().__init__(config)
        self.n, self.temperatures = n, temperatures
        rows = load_rows(
            config.prompts, "prompts", skip_bad=config.skip_bad_rows, columns=config.columns, limit=config.limit
        )
        self.count = len(rows.rows)
        asked = with_examples(config, rows, few_shot) if few_shot else rows
        codec = load_codec(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            templates=template_options(config),
        )
        self.width = memory.longest_prompt(asked.rows, codec, config.max_prompt_length)

    def lines(self) -> dict[str, Any]:
        """What --dry-run prints."""
        config = self.config
        completions = divide(config, self.count, self.n, self.temperatures).shard.count * self.n
        tokens = completions * config.max_new_tokens
        weights = count_weights(config.model, config.revision)
        weights += count_values(config.model, config.revision, config.ilql_beta)
        shown = {
            "prompts": self.count,
            "completions": completions,
            "tokens at most": tokens,
            "parameters": weights,
            "FLOPs at most": f"{2 * weights * tokens:.2e}",
        }
        return shown | engine_lines(config) | self.memory_lines()

    def phases_of(self, config: PlannedSampling, counted: Ledger) -> list[Phase]:
        if config.engine != "transformers":
            phases = engine_phases(config, counted, self.target, config.model)
            scorer = self.open_scorer(config, counted)
            return phases + scoring_phases(scorer, counted, config.engine_batch_size)
        policy = memory.open_sampled(counted, config.model, config.revision, self.target, config.ilql_beta)
        scorer = self.open_scorer(config, counted)
        held = {"weights": policy.size, "scorer": scorer.size}
        batch = batch_of(self.count, self.n, self.width, config).within(context_length(policy.model))

        def sample() -> int:
            with self.target.autocast():
                return memory.generate(policy.model, batch)

        phases = [memory.work(counted, "sampling", held, sample)]
        if scorer.models:
            phases.append(memory.work(counted, "scoring", held, lambda: scorer.run(batch.rows, batch.tokens)))
        return phases


def batch_of(prompts: int, n: int, width: int, config: Any) -> Batch:
    """The largest generation batch of `n` completions of each of the prompts."""
    first = batch_slices(prompts, n, config.generation_batch_size)[0]
    count = first.stop - first.start
    return Batch(count, count * n, width, config.max_new_tokens)


def scoring_phases(
    scorer: memory.PlannedScorer, counted: Ledger, texts: int, held: dict[str, int] | None = None
) -> list[Phase]:
    """Scoring `texts` as long as a forward pass of the scorer takes, beside what is `held` (by default the scorer).

    No phase where a function scores.
    """
    if not scorer.models:
        return []
    longest = scorer.tokens_per_batch
    held = held or {"scorer": scorer.size}
    return [memory.work(counted, "scoring", held, lambda: scorer.run(texts, longest))]
