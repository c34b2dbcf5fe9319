"""What --dry-run prints for a training command: updates, tokens, FLOPs, and the memory of one device by phase."""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import log
from ..data.encode import Limits, PairData, encode_pairs
from ..data.readers import Rows, load_rows
from ..inference import memory
from ..inference.fitting import lines_of
from ..inference.memory import Batch, Held, Phase, PlannedScorer
from ..models import ledger, quantized
from ..models.blocks import recompute_activations
from ..models.flops import ModelFlops, model_flops, sizes
from ..models.ledger import Ledger
from ..models.load import context_length, context_without_weights, untrained
from ..models.logprobs import Sequences
from . import pairs, setup
from .estimate import Pass, Update, gather, gathered_bytes, update_phase
from .held_out import load_rows as load_training_rows
from .options import AdapterOptions, FrontierOptions, PairPlanOptions, PlanOptions

_INSPECTED = 64  # updates whose micro-batches are built to find the largest


class TrainingPlan(ABC):
    """The plan of a command that trains a `policy` or a `reward` model. `head`: what it prints first.

    Phases are found for the config as it is, and for changes of it that might fit. The data is read once.
    """

    kind = "policy"
    whole = False  # rewards are read at last tokens, without a head over the vocabulary

    def __init__(self, config: PlanOptions):
        self.config = config
        self.target = memory.target_of(config)
        self.head: dict[str, Any] = {}
        self.steps = 0
        self.inspected: dict[Any, list[list[Sequences]]] = {}
        self.prompt_width = 0  # tokens of the longest of --eval-prompts, once it is known

    @abstractmethod
    def micros(self, config: Any, step: int) -> list[Sequences]:
        """The sequences of each of rank 0's micro-batches of an update, which are the largest."""

    @abstractmethod
    def loss(self, model: Any, sequences: Sequences) -> Tensor:
        """A scalar that costs what the command's loss does."""

    def reference_of(self, config: Any) -> tuple[str, str | None] | None:
        """(path, revision) of a reference whose log-probs are computed before the updates; None without one."""
        return None

    def held_beside(self, config: Any, trained: Held) -> dict[str, int]:
        """Bytes by name of what is held during the updates beside the trained model, on one device."""
        return {}

    def trained_model(self, model: Any) -> Any:
        """What is trained: the model, or one that contains it."""
        return model

    def flops(self, cost: ModelFlops, model: Any, sequences: Sequences) -> int:
        """FLOPs of a micro-batch's update; `cost` is that of the model that `model` is or contains."""
        return cost.of_update(sequences, whole=self.whole)

    def lines(self) -> dict[str, Any]:
        """What --dry-run prints."""
        config, world = self.config, self.config.plan_world_size or 1
        micros = self._inspected(config)
        tokens = sum(sizes(m, 1 << 30, whole=True)[0] for of_step in micros for m in of_step)
        tokens = int(tokens * self.steps / len(micros) * world)
        with ledger.planning(gpu=self.target.gpu):
            model = self._build(config)
            cost = model_flops(model)
            model = self.trained_model(model)
            parameters = quantized.count(model)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            flops = sum(self.flops(cost, model, m) for of_step in micros for m in of_step)
        largest = max((m for of_step in micros for m in of_step), key=_tokens)
        shown = {
            "updates": self.steps,
            "tokens": tokens,
            "parameters": parameters,
            "trained parameters": trained,
            "FLOPs": f"{flops * self.steps / len(micros) * world:.2e}",
            "devices": f"{world} ({config.parallel})" if world > 1 else 1,
            "largest micro-batch": f"{_tokens(largest)} tokens",
        }
        return self.head | shown | self.memory_lines()

    def memory_lines(self) -> dict[str, Any]:
        """The lines that concern memory."""
        return lines_of(self.config, self.target, self.phases)

    def phases(self, config: Any) -> list[Phase]:
        """The phases of the command with these options."""
        with log.silenced(), ledger.planning(gpu=self.target.gpu) as counted:
            before = counted.restart()
            model = self.trained_model(ledger.held(self._build(config), self.target.dtype))
            return self.phases_of(config, counted, Held(model, counted.restart() - before))

    def phases_of(self, config: Any, counted: Ledger, trained: Held) -> list[Phase]:
        """The phases in order; `trained` is the model in the precision in which it is trained."""
        phases = []
        if is_sharded(config):
            gather(trained.model, self.target.dtype)
        if reference := self.reference_of(config):
            phases.append(self._reference_phase(config, counted, trained, *reference))
        scorer = self._open_scorer(config, counted)
        phases.append(self._update_phase(config, counted, trained, scorer))
        if scorer:
            held = {name: phases[-1].parts.get(name, 0) for name in ("weights", "optimizer", "gathered")}
            held |= self.held_beside(config, trained)
            phases.append(evaluation_phase(config, counted, Evaluated(trained.model, scorer, held), self))
        return phases

    def _update_phase(self, config: Any, counted: Ledger, trained: Held, scorer: PlannedScorer | None) -> Phase:
        world = config.plan_world_size or 1
        if config.activation_checkpointing:
            recompute_activations(trained.model)
        update = Update(
            passes=self._passes(config),
            options=config,
            world=world,
            sharded=is_sharded(config),
            recompute=config.activation_checkpointing,
        )
        phase = update_phase(counted, trained.model, trained.size, update, self.target)
        held = self.held_beside(config, trained) | ({"scorer": scorer.size} if scorer and scorer.size else {})
        return replace(phase, parts=phase.parts | held) if held else phase

    def _passes(self, config: Any) -> list[Pass]:
        """The largest of the updates' first micro-batches, and the largest of those after them."""
        micros = self._inspected(config)
        first = max((of_step[0] for of_step in micros if of_step), key=_tokens)
        later = max((m for of_step in micros for m in of_step[1:]), key=_tokens, default=None)
        passes = [] if later is None else [Pass(partial(self.loss, sequences=later), accumulates=True)]
        if later is None or _tokens(first) > _tokens(later):
            passes.append(Pass(partial(self.loss, sequences=first), accumulates=False))
        return passes

    def _reference_phase(self, config: Any, counted: Ledger, trained: Held, path: str, revision: str | None) -> Phase:
        """The log-probs of the reference, which may be the model before training."""
        micros = self._inspected(config)
        largest = max((m for of_step in micros for m in of_step), key=_tokens)
        held, model = {"weights": trained.size}, trained.model
        if (path, revision) != (config.model, config.revision):
            reference = memory.open_frozen(counted, path, "policy", revision, self.target)
            held, model = held | {"reference": reference.size}, reference.model
        if is_sharded(config):
            held = {name: -(-size // config.plan_world_size) for name, size in held.items()}
            held["gathered"] = gathered_bytes(model, self.target.dtype, learning=False)

        def run() -> None:
            with torch.no_grad(), self.target.autocast():
                self.loss(model, largest)

        return memory.work(counted, "reference", held, run)

    def _open_scorer(self, config: Any, counted: Ledger) -> PlannedScorer | None:
        """The scorer of --eval-prompts, which is held from the beginning."""
        if not getattr(config, "eval_prompts", None):
            return None
        tokens = config.scorer_tokens_per_batch
        return memory.open_scorer(counted, config.scorer, config.scorer_revision, self.target, tokens)

    def _build(self, config: AdapterOptions) -> Any:
        """The model with its adapters, of fake tensors."""

        def build() -> Any:
            model = untrained(config.model, self.kind, revision=config.revision)
            if config.quantize:
                quantized.plan(model, config.quantize)
            with log.silenced():
                setup.adapt(config, model, {"policy": "CAUSAL_LM", "reward": "SEQ_CLS"}[self.kind])
            return model

        return ledger.fake(build, gpu=self.target.gpu)

    def _inspected(self, config: Any) -> list[list[Sequences]]:
        """The micro-batches of the first updates; built once for each config."""
        if config not in self.inspected:
            steps = range(min(self.steps, _INSPECTED))
            self.inspected[config] = [list(self.micros(config, step)) for step in steps]
        return self.inspected[config]


class Evaluated:
    """A policy at a point of the frontier, the scorer, and the bytes that are `held` meanwhile."""

    def __init__(self, policy: Any, scorer: PlannedScorer, held: dict[str, int]):
        self.policy, self.scorer, self.held = policy, scorer, held


def evaluation_phase(config: Any, counted: Ledger, evaluated: Evaluated, plan: TrainingPlan) -> Phase:
    """A point of the frontier: the policy's completions of --eval-prompts, scored, and its KL to the reference."""
    reference = _frontier_reference(config, counted, evaluated, plan)
    batch = eval_batch(config, plan, context_length(evaluated.policy))
    size = -(-reference.size // config.plan_world_size) if is_sharded(config) else reference.size
    held = evaluated.held | {"scorer": evaluated.scorer.size, "reference": size}

    def run() -> int:
        with plan.target.autocast():  # one for all, which keeps autocast's copies of the trained weights
            cache = memory.generate(evaluated.policy, batch)
            evaluated.scorer.run(batch.rows, batch.tokens)
            memory.compare(evaluated.policy, reference.model, batch, config.tokens_per_batch)
        return cache

    return memory.work(counted, "evaluation", held, run)


def _frontier_reference(config: Any, counted: Ledger, evaluated: Evaluated, plan: TrainingPlan) -> Held:
    """The reference; of adapters on it, the policy without them."""
    path, revision = config.reference
    if config.lora and (path, revision) == (config.model, config.revision) and not is_sharded(config):
        return Held(evaluated.policy, 0)
    return memory.open_frozen(counted, path, "policy", revision, plan.target)


def eval_batch(config: FrontierOptions, plan: TrainingPlan, context: int | None) -> Batch:
    """The largest generation batch of a point of the frontier."""
    assert config.eval_prompts is not None
    rows = load_rows(
        config.eval_prompts, "prompts", skip_bad=config.skip_bad_rows, columns=config.columns, limit=config.eval_limit
    ).rows
    if not plan.prompt_width:
        codec = setup.codec_of(plan.config)  # type: ignore[arg-type]
        plan.prompt_width = memory.longest_prompt(rows, codec, config.max_prompt_length)
    count = min(len(rows), config.generation_batch_size)
    return Batch(count, count, plan.prompt_width, config.max_new_tokens).within(context)


class PairsPlan(TrainingPlan):
    """The plan of a training on preferences, in the order of `pairs.pair_stream`."""

    config: PairPlanOptions
    kind_of_rows, unit = "preferences", "pairs"

    def __init__(self, config: PairPlanOptions, *shuffle: str):
        super().__init__(config)
        rows, _ = load_training_rows(config, self.kind_of_rows)
        context = context_without_weights(config.model, revision=config.revision)
        limits = setup.limits_within(context, config.max_length, config.max_prompt_length)
        self.data = self.encode(config, rows, limits)
        self.sequences = pairs.sequences(self.data)
        self.stream = pairs.pair_stream(self.data, config, *shuffle)
        self.steps = self.stream.steps
        data, completions = self.data, {i for pair in self.data.pairs for i in pair}
        self.head = {self.unit: len(data.pairs), "prompts": len(data.prompts), "completions": len(completions)}

    def encode(self, config: Any, rows: Rows, limits: Limits) -> PairData:
        """The pairs of the rows."""
        return encode_pairs(rows, setup.codec_of(config), limits)

    def micros(self, config: Any, step: int) -> list[Sequences]:
        world = config.plan_world_size or 1
        batches = pairs.micro_batches(self.data, self.stream.batch(step), config.tokens_per_batch, 0, world)
        return [[self.sequences[i] for i in batch.completions] for batch in batches]


def is_sharded(config: Any) -> bool:
    """Whether --parallel fsdp shards the model over the devices of the plan."""
    return config.parallel == "fsdp" and (config.plan_world_size or 1) > 1


def _tokens(sequences: Sequences) -> int:
    """Tokens of a micro-batch, each prompt counted once."""
    return sizes(sequences, 1 << 30, whole=True)[0]
