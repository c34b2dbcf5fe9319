"""The optimizer, gradient clipping and learning-rate schedules of training."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from ..runtime import replicated


class OptimizerOptions(Protocol):
    """The options that make_optimizer reads."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


class ScheduleOptions(Protocol):
    """The options that learning_rate reads."""

    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...


def make_optimizer(options: OptimizerOptions, model: nn.Module) -> torch.optim.Optimizer:
    """RMSprop, or AdamW with betas (0.9, 0.999), over the weights that are trained."""
    parameters = replicated.trainable(model)
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=options.lr,
        betas=(0.9, 0.999),
        eps=getattr(options, "adam_eps", 1e-8),
        weight_decay=options.weight_decay,
        fused=parameters[0].device.type in ("cpu", "cuda"),  # one pass over memory instead of ten
    )


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm [] of all gradients, on their device; of sharded ones a DTensor."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: nn.Module, limit: float, norm: Tensor, value: float) -> None:
    """Scale gradients down to the norm `limit` where theirs, whose value is known, is larger (limit 0: never)."""
    if limit and value > limit:  # otherwise skip a pass over all gradients
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)


def learning_rate(options: ScheduleOptions, step: int, steps: int) -> float:
    """Learning rate of update `step` (0-based): a linear rise over the warm-up, then constant, linear or cosine."""
    rise = min(1.0, (step + 1) / (options.warmup_steps + 1))
    done = max(0.0, (step - options.warmup_steps) / max(1, steps - options.warmup_steps))
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[options.schedule]
    return options.lr * rise * fall
