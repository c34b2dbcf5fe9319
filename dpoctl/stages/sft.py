"""Supervised fine-tuning on texts, on completions, or on one side of preferences (Preferred-FT)."""

from typing import Any

import torch

from ..config.training import SFT
from ..models.load import context_without_weights
from ..models.logprobs import Sequences, response_token_logps
from ..outputs.claims import Output
from ..training import fine_tuning, held_out, loop, setup
from ..training.plan import TrainingPlan


def run(config: SFT, output: Output) -> None:
    """Train and save the run directory."""
    loop.train(fine_tuning.FineTuning(config, output))


def plan(config: SFT) -> dict:
    """What --dry-run prints."""
    return Plan(config).lines()


class Plan(TrainingPlan):
    """Updates on packed texts, and points of the frontier."""

    def __init__(self, config: SFT):
        super().__init__(config)
        rows, _ = held_out.load_rows(config, fine_tuning.kind_of(config))
        context = context_without_weights(config.model, revision=config.revision)
        limits = setup.limits_within(context, config.max_length, config.max_prompt_length)
        self.examples, _ = fine_tuning.encode(config, rows, setup.codec_of(config), limits)
        self.stream = fine_tuning.stream_of(config, len(self.examples))
        self.steps, self.head = self.stream.steps, {"rows": len(self.examples)}

    def micros(self, config: SFT, step: int) -> list[Sequences]:
        batch = [self.examples[i] for i in self.stream.batch(step)]
        groups = fine_tuning.share_and_pack(batch, config.tokens_per_batch, config.plan_world_size or 1)
        return [[(e.ids, e.start) for e in group] for group in groups]

    def loss(self, model: Any, sequences: Sequences) -> torch.Tensor:
        return -response_token_logps(model, sequences)[0].sum()
