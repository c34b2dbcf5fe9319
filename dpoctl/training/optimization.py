"""The optimizer, gradient clipping and learning-rate schedules of training."""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime import replicated

EIGHT_BIT = "adamw-8bit"


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
    """RMSprop, or AdamW with betas (0.9, 0.999), over the weights that are trained.

    No step copies all weights, as `foreach`, the default on a GPU, would. The state of `adamw-8bit` has 8 bits a value
    (2110.02861). Raises InputError where its package is not installed.
    """
    parameters = replicated.trainable(model)
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=options.lr, weight_decay=options.weight_decay, foreach=False)
    adam: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.999), "weight_decay": options.weight_decay}
    adam["eps"] = getattr(options, "adam_eps", 1e-8)
    if options.optimizer == EIGHT_BIT:
        return _adamw_8bit()(parameters, **adam)
    fused = parameters[0].device.type in ("cpu", "cuda")  # one pass over memory instead of ten
    return torch.optim.AdamW(parameters, **adam, foreach=False, fused=fused)


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            f"--optimizer {EIGHT_BIT}: bitsandbytes is not installed", hint="pip install 'dpoctl[quantize]'"
        ) from None
    return AdamW8bit


def state_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of the state of an optimizer of `make_optimizer` for weights in float32.

    One moment (rmsprop) or two; for adamw-8bit as bitsandbytes lays it out: 2 bytes a value and 8 for 256 of them, but
    float32 for weights of fewer than 4,096 values, and two tables of 256 values.
    """
    sizes = [p.numel() for p in parameters]
    if optimizer == EIGHT_BIT:
        return 2048 + sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in sizes)
    return sum(4 * n * (1 if optimizer == "rmsprop" else 2) for n in sizes)


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
