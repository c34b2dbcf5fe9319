"""Align a policy with preferences by DPO or one of its relatives (2305.18290, section 4)."""

from typing import Any

import torch

from ..config.training import TrainDPO
from ..models.logprobs import Sequences, summed_logps
from ..outputs.claims import Output
from ..training import loop
from ..training.dpo import DPO
from ..training.plan import plan_of_pairs


def run(config: TrainDPO, output: Output) -> None:
    """Train and save the run directory."""
    loop.train(DPO(config, output))


def plan(config: TrainDPO) -> dict:
    """What --dry-run prints."""
    return plan_of_pairs(config, "policy", _loss, config.shuffle)


def _loss(model: Any, sequences: Sequences) -> torch.Tensor:
    return summed_logps(model, sequences).sum()
