"""Supervised fine-tuning on texts, on completions, or on one side of preferences (Preferred-FT)."""

from typing import Any

import torch

from ..config.training import SFT
from ..data.encode import Limits
from ..models.logprobs import Sequences, response_token_logps
from ..outputs.claims import Output
from ..training import fine_tuning, held_out, loop, setup
from ..training.plan import plan_of_training


def run(config: SFT, output: Output) -> None:
    """Train and save the run directory."""
    loop.train(fine_tuning.FineTuning(config, output))


def plan(config: SFT) -> dict:
    """What --dry-run prints."""
    codec = setup.codec_of(config)
    rows, _ = held_out.load_rows(config, fine_tuning.kind_of(config))
    examples, _ = fine_tuning.encode(config, rows, codec, Limits(config.max_length, config.max_prompt_length))
    stream = fine_tuning.stream_of(config, len(examples))

    def micros(step: int) -> list[Sequences]:
        batch = [examples[i] for i in stream.batch(step)]
        groups = fine_tuning.share_and_pack(batch, config.tokens_per_batch, config.plan_world_size or 1)
        return [[(e.ids, e.start) for e in group] for group in groups]

    def loss(model: Any, sequences: Sequences) -> torch.Tensor:
        return -response_token_logps(model, sequences)[0].sum()

    return plan_of_training(config, "policy", stream.steps, micros, loss, rows=len(examples))
