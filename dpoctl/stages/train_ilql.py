"""Learn values of tokens beside a policy, from completions with returns, by ILQL (2206.11871)."""

from typing import Any

import torch

from ..config.ilql import TrainILQL
from ..data.gaps import size
from ..models.flops import ModelFlops
from ..models.ilql import IlqlModel, make_heads
from ..models.load import context_without_weights
from ..models.logprobs import Sequences
from ..objectives.ilql import Weights, ilql_losses
from ..outputs.claims import Output
from ..training import held_out, ilql, loop, setup
from ..training.plan import TrainingPlan


def run(config: TrainILQL, output: Output) -> None:
    """Train and save the run directory."""
    loop.train(ilql.ILQL(config, output))


def plan(config: TrainILQL) -> dict:
    """What --dry-run prints."""
    return Plan(config).lines()


class Plan(TrainingPlan):
    """Updates of policy and heads; held-out losses take less than they do."""

    config: TrainILQL

    def __init__(self, config: TrainILQL):
        super().__init__(config)
        rows, _ = held_out.load_rows(config, config.rows)
        context = context_without_weights(config.model, revision=config.revision)
        limits = setup.limits_within(context, config.max_length, config.max_prompt_length)
        self.episodes, _ = ilql.encode(config, rows, setup.codec_of(config), limits)
        self.stream = ilql.stream_of(config, len(self.episodes))
        self.steps, self.head = self.stream.steps, {"completions": len(self.episodes)}

    def micros(self, config: TrainILQL, step: int) -> list[Sequences]:
        batch = [self.episodes[i] for i in self.stream.batch(step)]
        groups = ilql.share_and_pack(batch, config.tokens_per_batch, config.plan_world_size or 1)
        return [ilql.sequences_of(group) for group in groups]

    def trained_model(self, policy: Any) -> IlqlModel:
        return IlqlModel(policy, make_heads(policy, None))

    def flops(self, cost: ModelFlops, model: IlqlModel, sequences: Sequences) -> int:
        tokens = sum(map(size, sequences))
        return cost.of_update(sequences) + tokens * model.heads.flops()

    def loss(self, model: Any, sequences: Sequences) -> torch.Tensor:
        weights = Weights(self.config.tau, self.config.gamma, self.config.cql_coef, self.config.sft_coef)
        return ilql_losses(model(sequences), torch.zeros(len(sequences)), weights)["total"].sum()
