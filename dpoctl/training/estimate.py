"""What an update takes: memory by part, found by running the update on fake tensors (`models.ledger`).

All blocks are run, forward and backward on the largest micro-batches, and then the optimizer's step. Gradients are
made in an update's first backward pass and freed at its end: the forward pass of its first micro-batch holds none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.memory import Phase, Target
from ..models import ledger
from ..models.blocks import blocks, shards
from ..models.ledger import Ledger
from ..runtime import replicated
from .optimization import EIGHT_BIT, OptimizerOptions, make_optimizer, state_bytes

UPDATE = "updates"


@dataclass(frozen=True)
class Pass:
    """A micro-batch: `loss(model)`; `accumulates`: gradients of earlier micro-batches of the update are held."""

    loss: Callable[[nn.Module], Tensor]
    accumulates: bool


@dataclass(frozen=True)
class Update:
    """What an update does on one device.

    One of `passes` makes the peak. `options` are those of the optimizer. Each of `world` devices holds everything, or
    (`sharded`) its shard of weights, gradients and optimizer state. `recompute`: with activation checkpointing, which
    the model must have.
    """

    passes: Sequence[Pass]
    options: OptimizerOptions
    world: int = 1
    sharded: bool = False
    recompute: bool = False


def update_phase(counted: Ledger, model: nn.Module, weights: int, update: Update, target: Target) -> Phase:
    """The phase of the updates of a model of fake tensors whose weights take `weights` bytes.

    A sharded model's weights are `gathered`. Neither gradients nor optimizer state are left.
    """
    trained = replicated.trainable(model)
    held = {
        "weights": weights,
        "gradients": sum(4 * p.numel() for p in trained),  # trained weights and their gradients are float32
        "optimizer": state_bytes(update.options.optimizer, trained),
    }
    if update.sharded:
        gathered = gathered_bytes(model, target.dtype)
        step = 2 * max((4 * p.numel() for p in trained), default=0) // update.world
        # shards of the gradients are held throughout
        beyond, activations = max(
            _forward_backward(counted, model, update, target, replace(each, accumulates=True)) for each in update.passes
        )
        held = {name: -(-size // update.world) for name, size in held.items()} | {"gathered": gathered}
    else:
        beyond, activations = max(
            _beside(held["gradients"], each, _forward_backward(counted, model, update, target, each))
            for each in update.passes
        )
        step = _step_bytes(counted, model, update)
    temporary = max(beyond, step)
    activations = min(activations, temporary)
    buckets = min(held["gradients"], replicated.BUCKET_BYTES) if update.world > 1 and not update.sharded else 0
    return Phase(UPDATE, held | {"activations": activations, "temporary": temporary - activations + buckets})


def _beside(gradients: int, each: Pass, found: tuple[int, int]) -> tuple[int, int]:
    """What a pass takes beside `gradients`, which an update's first pass makes itself."""
    beyond, activations = found
    return (beyond if each.accumulates else beyond - gradients), activations


def _forward_backward(counted: Ledger, model: nn.Module, update: Update, target: Target, each: Pass) -> tuple[int, int]:
    """(bytes at the peak beyond what was held before, of them what the last block's end found kept)."""
    for p in replicated.trainable(model):
        p.grad = torch.zeros_like(p) if each.accumulates else None
    start = counted.restart()
    kept = [start]

    def note(*_: Any) -> None:
        kept[0] = counted.now

    hooks = [block.register_forward_hook(note) for block in blocks(model)]
    with target.autocast(cached=not update.recompute):
        loss = each.loss(model)
    for hook in hooks:
        hook.remove()
    loss.backward()  # outside autocast, as in the loop: its copies of the weights are freed by then
    peak = counted.peak - start
    model.zero_grad(set_to_none=True)
    return peak, kept[0] - start


def _step_bytes(counted: Ledger, model: nn.Module, update: Update) -> int:
    """Bytes that the optimizer's step takes beyond weights, gradients and state."""
    if update.options.optimizer == EIGHT_BIT:  # its kernels work in place
        return 0
    optimizer = make_optimizer(update.options, model)
    for p in replicated.trainable(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the state
    start = counted.restart()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return counted.peak - start


def gather(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model of fake tensors the weights that FSDP gathers, in the compute dtype: autocast does not copy them."""
    ledger.replace_tensors(model, lambda t: t.to(dtype) if t.is_floating_point() else t)


def gathered_bytes(model: nn.Module, dtype: torch.dtype, *, learning: bool = True) -> int:
    """Bytes that FSDP gathers: weights and gradients of the head, or of tied embeddings, and of the two largest other
    parts, and the float32 buffer that one part's gradients are summed in; without `learning`, of the weights alone."""
    parts = shards(model)
    every, trained = (
        sorted(sum(p.numel() for p in ps(part)) for part in parts)
        for ps in (lambda m: m.parameters(), replicated.trainable)
    )
    rest = sum(p.numel() for p in model.parameters()) - sum(every)
    rest_trained = sum(p.numel() for p in replicated.trainable(model)) - sum(trained)
    if not learning:
        return (rest + sum(every[-2:])) * dtype.itemsize
    sums = 0 if dtype == torch.float32 else 4 * max(max(trained), rest_trained)
    return (rest + rest_trained + sum(every[-2:]) + sum(trained[-2:])) * dtype.itemsize + sums
