"""What --dry-run prints of evaluate's memory: each model beside reference, scorers and --lm."""

from dataclasses import dataclass
from typing import NamedTuple

from ..config.sampling import Evaluate
from ..data.readers import Rows, load_rows
from ..models.ledger import Ledger
from ..models.load import context_length
from ..models.tokenizers import load_codec
from . import memory
from .engine_planning import engine_phases
from .memory import Phase
from .options import template_options
from .planning import RowPlan, batch_of, scoring_phases
from .stored_samples import longest
from .values import beta_of_samples

_TEXTS = 1024  # more than a forward pass of a scorer takes


class _Samples(NamedTuple):
    """A completions file that --model sampled, with this beta of its values."""

    batch: memory.Batch
    beta: float | None


class EvaluationPlan(RowPlan):
    """Each model beside reference, scorers and --lm; completions files need the latter alone."""

    config: Evaluate

    def __init__(self, config: Evaluate, prompts: Rows | None, models: list[str], files: list[str]):
        super().__init__(config)
        self.prompts, self.models = prompts, models
        self.width = 0
        self.samples: list[_Samples] = []
        for path in files if config.sampled_by else ():
            rows = load_rows(path, "completions", skip_bad=config.skip_bad_rows, columns=config.columns).rows
            beta = beta_of_samples(path, next(iter(config.ilql_beta), None))
            self.samples.append(_Samples(memory.Batch(len(rows), len(rows), *longest(rows)), beta))
        if prompts and models:
            codec = load_codec(
                models[0],
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                templates=template_options(config),
            )
            self.width = memory.longest_prompt(prompts.rows, codec, config.max_prompt_length)

    def phases_of(self, config: Evaluate, counted: Ledger) -> list[Phase]:
        scorers = [
            self.open_scorer(config, counted),
            self.open_scorer(config, counted, "selection_scorer"),
        ]
        others = {
            name: memory.open_frozen(counted, path, "policy", revision, self.target)
            for name, path, revision in (
                ("reference", config.ref, config.ref_revision),
                ("lm", config.lm, config.lm_revision),
            )
            if path
        }
        generating: list[Phase] = []
        if config.engine != "transformers":
            generating = [phase for path in self.models for phase in engine_phases(config, counted, self.target, path)]
        held = {"scorer": sum(s.size for s in scorers)} | {name: each.size for name, each in others.items()}
        beside = _Beside(scorers[0], others)
        phases = []
        for path in self.models:
            beta = max(config.ilql_beta, default=None)
            policy = memory.open_sampled(counted, path, config.revision, self.target, beta)
            phases.append(self._model_phase(config, counted, policy, beside, held))
            del policy
        phases += [self._samples_phase(config, counted, samples, beside, held) for samples in self.samples]
        if phases:
            return [max(found, key=lambda phase: phase.total) for found in (generating, phases) if found]
        return [phase for scorer in scorers for phase in scoring_phases(scorer, counted, _TEXTS, held)]

    def _model_phase(
        self, config: Evaluate, counted: Ledger, policy: memory.Held, beside: "_Beside", held: dict[str, int]
    ) -> Phase:
        """Sampling from a policy, and measuring its completions."""
        assert self.prompts is not None
        batch = batch_of(len(self.prompts.rows), config.n, self.width, config)
        batch = batch.within(context_length(policy.model))
        texts = len(self.prompts.rows) * config.n

        def run() -> int:
            with self.target.autocast():
                cache = memory.generate(policy.model, batch) if config.engine == "transformers" else 0
                beside.measure(policy, batch, texts, config.tokens_per_batch)
            return cache

        return memory.work(counted, "evaluation", {"weights": policy.size} | held, run)

    def _samples_phase(
        self, config: Evaluate, counted: Ledger, samples: "_Samples", beside: "_Beside", held: dict[str, int]
    ) -> Phase:
        """Measuring completions that a policy sampled earlier."""
        assert config.sampled_by is not None
        policy = memory.open_sampled(counted, config.sampled_by, config.revision, self.target, samples.beta)
        batch = samples.batch.within(context_length(policy.model))

        def run() -> None:
            with self.target.autocast():
                beside.measure(policy, batch, samples.batch.rows, config.tokens_per_batch)

        return memory.work(counted, "evaluation", {"weights": policy.size} | held, run)


@dataclass(frozen=True)
class _Beside:
    """The models that measure a policy's completions: the scorer, and the reference and --lm where they are given."""

    scorer: memory.PlannedScorer
    others: dict[str, memory.Held]

    def measure(self, policy: memory.Held, batch: memory.Batch, texts: int, tokens_per_batch: int) -> None:
        """Score completions and compare log-probs, on fake tensors."""
        self.scorer.run(texts, batch.tokens)
        for other in self.others.values():
            memory.compare(policy.model, other.model, batch, tokens_per_batch)
