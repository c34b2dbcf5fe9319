"""Data parallelism: the model is replicated on all ranks, and gradients are summed over them.

Ranks may have different numbers of micro-batches, so gradients are summed once per update, after the last one. torch's
DistributedDataParallel can overlap the sum with the last backward pass and gives the same sums. It is not used: with
several micro-batches an update it holds a second copy of all gradients, its buckets, where this holds 32 MB.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from . import collectives
from .fsdp_root import is_sharded

BUCKET_BYTES = 32 << 20  # gradients are communicated in flat buffers of this size


def trainable(model: nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def broadcast_weights(model: nn.Module) -> None:
    """Give every rank rank 0's weights."""
    if collectives.world_size() == 1 or is_sharded(model):
        return
    for bucket in _buckets(trainable(model)):
        flat = torch.cat([p.reshape(-1) for p in bucket])
        torch.distributed.broadcast(flat, src=0)
        _copy_back(flat, bucket)


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Sum gradients over the ranks, in place; weights without a gradient on any rank keep none."""
    if collectives.world_size() == 1 or is_sharded(model):  # FSDP sums in its backward pass
        return
    parameters = trainable(model)
    reached = collectives.reduce_over_ranks(
        torch.tensor([p.grad is not None for p in parameters], dtype=torch.int8), "max"
    )
    used = [p for p, on_any_rank in zip(parameters, reached.tolist(), strict=True) if on_any_rank]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in used if p.grad is not None]):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        _copy_back(collectives.sum_over_ranks(flat), bucket)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors in groups of one dtype and at most a bucket's bytes (at least one tensor)."""
    group: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if group and (held + size > BUCKET_BYTES or tensor.dtype != group[0].dtype):
            yield group
            group, held = [], 0
        group.append(tensor)
        held += size
    if group:
        yield group


def _copy_back(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
