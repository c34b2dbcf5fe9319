"""Train a reward model on preferences, for PPO and best-of-N (2305.18290, section 3)."""

from typing import Any

import torch

from ..config.training import TrainRM
from ..data.encode import Limits, PairData
from ..data.readers import Rows
from ..models.logprobs import Sequences
from ..models.rewards import last_token_rewards
from ..outputs.claims import Output
from ..reports.accuracies import show_accuracies
from ..runtime import collectives
from ..training import loop
from ..training.plan import PairsPlan
from ..training.reward_model import RewardModel, groups_of


def run(config: TrainRM, output: Output) -> None:
    """Train and save the run directory."""
    task = RewardModel(config, output)
    loop.train(task)
    if config.by and collectives.rank() == 0:
        show_accuracies(config.by, task.by_group, f"Held-out accuracy by {config.by}")


def plan(config: TrainRM) -> dict:
    """What --dry-run prints."""
    return Plan(config).lines()


class Plan(PairsPlan):
    """Updates; validation takes less than they do."""

    kind, whole = "reward", True

    def encode(self, config: TrainRM, rows: Rows, limits: Limits) -> PairData:
        if not config.eval_data:
            groups_of(rows, config.by)  # refuses what a run refuses
        return super().encode(config, rows, limits)

    def loss(self, model: Any, sequences: Sequences) -> torch.Tensor:
        return last_token_rewards(model, sequences).sum()
