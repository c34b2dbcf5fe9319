"""Collectives over the ranks of a run: sums, gathering, broadcasting. Without torchrun there is one rank."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import rendezvous

rank, world_size = rendezvous.rank, rendezvous.world_size


def join_ranks(device: torch.device, minutes: float) -> None:
    """Join the process group of torchrun's ranks; a collective that waits longer than `minutes` fails."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # metrics are summed on the CPU
        store=dist.PrefixStore(f"dpoctl/group/{rendezvous.broadcasts()}", rendezvous.store(minutes)),
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(minutes=minutes),
    )
    rendezvous.joined(minutes)


def leave_ranks() -> None:
    rendezvous.joined(None)
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over all ranks."""
    return reduce_over_ranks(tensor, "sum")


def reduce_over_ranks(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The `sum`, `min` or `max` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[kind])
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(reduce_over_ranks(torch.tensor(int(flag)), "max").item())


def gather(item: Any) -> list[Any]:
    """The items of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_rank_0(item: Any) -> Any:
    """Rank 0's item, on every rank."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items, src=0)
    return items[0]
