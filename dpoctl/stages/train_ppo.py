"""Align a policy by PPO with a KL penalty to its reference (2305.18290, section 6 and appendix)."""

from typing import Any

from ..config.ppo import TrainPPO
from ..outputs.claims import Output
from ..training import loop, ppo
from ..training.ppo_plan import PPOPlan


def run(config: TrainPPO, output: Output) -> None:
    """Train and save the run directory."""
    loop.train(ppo.PPO(config, output))


def plan(config: TrainPPO) -> dict[str, Any]:
    """What --dry-run prints."""
    return PPOPlan(config).lines()
