"""What an update will cost: memory by part and FLOPs, measured by running the update on fake tensors.

The model is built of fake tensors (shapes without memory). The functions that train it run forward and backward on a
micro-batch and an optimizer step, while a ledger records every storage that is allocated and freed. So activation
checkpointing, adapters, precision and the head's tiles need no formulas.
"""

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..models import quantized, tiled_head
from ..models.blocks import blocks, recompute_activations, stacks
from ..runtime import devices, replicated


@dataclass
class Estimate:
    """Bytes on one device by part at the peak; `flops` of the micro-batch's forward and backward pass."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    flops: int
    parameters: int
    trained: int


PARTS = ("weights", "gradients", "optimizer", "activations", "head")


class _Ledger(TorchDispatchMode):
    """Bytes of all live storages, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, out)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@dataclass(frozen=True)
class Update:
    """What an update does on one device.

    `loss(model)` is that of its largest micro-batch, which has `rows` response tokens; `several` says whether there are
    more micro-batches, so that gradients are held while the next one is computed. Each of `world` devices holds
    everything, or (`sharded`) its shard of weights, gradients and optimizer state.
    """

    loss: Callable[[torch.nn.Module], torch.Tensor]
    optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
    rows: int
    several: bool
    dtype: torch.dtype
    world: int = 1
    sharded: bool = False
    recompute: bool = False  # activation checkpointing


def estimate(build: Callable[[], torch.nn.Module], update: Update) -> Estimate:
    """The estimate for the model that `build()` gives, ready to train.

    Blocks are alike, so the update runs with one and with two of them and the others are extrapolated: estimating a
    large model takes no longer than estimating a small one.
    """
    with torch.device("meta"):
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True), _Ledger() as ledger:
        _replace(model, lambda t: torch.empty_like(t, device="cpu"))
        if update.recompute:
            recompute_activations(model)
        weights, gradients = _bytes(model.parameters()), _bytes(replicated.trainable(model))
        parameters, trained = quantized.count(model), sum(p.numel() for p in replicated.trainable(model))
        depth = max(len(stack) for stack in stacks(model))
        gathered = _gathered_bytes(model, update.dtype) if update.sharded else 0
        two, two_flops, state = _run(model, 2, update, ledger)
        one, one_flops, _ = _run(model, 1, update, ledger)
        tiles = _head_bytes(model, update)
    more = max(0, depth - 2)
    state = state * gradients  # bytes of state for a byte of gradient
    shares = update.world if update.sharded else 1
    buffer = min(gradients, replicated.BUCKET_BYTES) if update.world > 1 and not update.sharded else 0
    return Estimate(
        weights=weights // shares + gathered,
        gradients=gradients // shares + buffer,
        optimizer=int(state) // shares,
        activations=max(0, two + (two - one) * more - tiles),
        head=tiles,
        flops=two_flops + (two_flops - one_flops) * more,
        parameters=parameters,
        trained=trained,
    )


def _replace(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace each weight and buffer by what `change` returns; tied ones stay tied."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        tables: list[tuple[dict[str, Any], Any]] = [
            (module._parameters, nn.Parameter),
            (module._buffers, lambda tensor, _: tensor),
        ]
        for held, make in tables:
            for name, old in held.items():
                if old is not None:
                    new = known.get(id(old))
                    held[name] = known[id(old)] = make(change(old.detach()), old.requires_grad) if new is None else new


def _run(model: nn.Module, depth: int, update: Update, ledger: _Ledger) -> tuple[int, int, float]:
    """(bytes beyond weights, gradients and state at the peak, FLOPs, state by gradients) with the first `depth` blocks.

    Autocast's copies of the weights are among those bytes: they are kept for the backward pass.
    """
    for stack in stacks(model):
        del stack[depth:]
    optimizer = update.optimizer(model)
    for p in replicated.trainable(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the state
    held, gradients = _bytes(model.parameters()), _bytes(replicated.trainable(model))
    state = _bytes(v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    ratio = state / max(1, gradients)
    if update.sharded:  # a block is gathered in the compute dtype; its optimizer step is on a shard
        del optimizer
        state = 0
        _replace(model, lambda t: t.to(update.dtype) if t.is_floating_point() else t)
        held, gradients = _bytes(model.parameters()), _bytes(replicated.trainable(model))
        for p in replicated.trainable(model):
            p.grad = torch.zeros_like(p)
    elif not update.several:
        model.zero_grad(set_to_none=True)
    gc.collect()
    ledger.peak = ledger.now
    _forward_backward(model, update)
    if not update.sharded:
        optimizer.step()
    beyond = ledger.peak - held - gradients - state
    with FlopCounterMode(display=False) as counter:  # a separate run: the counter keeps tensors alive
        _forward_backward(model, update)
    model.zero_grad(set_to_none=True)
    return beyond, counter.get_total_flops(), ratio


def _forward_backward(model: nn.Module, update: Update) -> None:
    with devices.autocast(torch.device("cpu"), update.dtype):
        loss = update.loss(model)
    loss.backward()  # outside autocast, as in the loop: its copies of the weights are freed by then


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _head_bytes(model: nn.Module, update: Update) -> int:
    """Bytes of the softmax tiles that the head keeps for the backward pass, or of the one that it recomputes."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return 0 if output is None else tiled_head.kept_bytes(update.rows, output.weight.shape[0], update.dtype.itemsize)


def _gathered_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that FSDP gathers: weights and gradients of the embeddings and of two blocks at a time, and the float32
    buffer that one block's gradients are summed in."""
    every, trained = (
        [sum(p.numel() for p in ps(block)) for block in blocks(model)] for ps in (lambda m: m.parameters(), _trained)
    )
    rest = sum(p.numel() for p in model.parameters()) - sum(every)
    rest_trained = sum(p.numel() for p in replicated.trainable(model)) - sum(trained)
    sums = 0 if dtype == torch.float32 else 4 * max(max(trained), rest_trained)
    return (rest + rest_trained + 2 * (max(every) + max(trained))) * dtype.itemsize + sums


def _trained(module: nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
