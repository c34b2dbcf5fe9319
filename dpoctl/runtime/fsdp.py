"""Sharding a model's weights, gradients and optimizer state over the ranks with torch's FSDP2."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from . import collectives
from .fsdp_root import FsdpRoot, attach_root, is_sharded


def shard(model: nn.Module, parts: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model in place: float32 shards, computed in `dtype`, gradients summed in float32 over the ranks.

    Rank 0 holds the full weights; on the other ranks they may be on the meta device, where only the shards get memory.
    `parts` are gathered one by one, the rest together. Raises InputError for weights whose shapes or ties differ from
    the configuration's.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    shapes = collectives.gather([(name, tuple(t.shape)) for name, t in _tensors(model).items()])
    if any(other != shapes[0] for other in shapes):
        hint = "save it again with save_pretrained and the tie_word_embeddings that its weights have"
        raise InputError(f"{type(model).__name__}: its weights are not those that its config.json describes", hint)
    full_weights = _tensors(model) if collectives.rank() == 0 else {}
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    precision = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    root = FsdpRoot(model)
    for module in [*parts, root]:
        # The root is resharded after its forward too, so that its weights are never stale when they are saved.
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are shares of the global mean: gradients are summed
        module.set_force_sum_reduction_for_comms(True)  # also on gloo, which has no premultiplied sum
    attach_root(model, root)
    if any(t.is_meta for t in _tensors(model).values()):
        model.to_empty(device=device)
    for name, target in _tensors(model).items():
        full = (
            full_weights.pop(name).to(device)
            if full_weights
            else torch.empty(target.shape, dtype=target.dtype, device=device)
        )
        dist.broadcast(full, 0)
        if _is_sharded_tensor(target):
            first, end = rows_of(target)
            full = full[first:end]
        local_part(target).copy_(full)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, including those that are not saved."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def in_lockstep(model: nn.Module, micros: Sequence[Any], dummy: Callable[[], Any]) -> Iterator[Any]:
    """This rank's micro-batches; of a sharded model `dummy()` follows until every rank has run equally many.

    Ranks gather weights together, so one that ran fewer would leave the others waiting.
    """
    most = max(collectives.gather(len(micros))) if is_sharded(model) else len(micros)
    yield from micros
    for _ in range(most - len(micros)):
        dummy()


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if _is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that ranks may share, on every rank."""
    return tensor.full_tensor() if _is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's weights on this rank."""
    return sum(part.numel() * part.element_size() for part in map(local_part, model.parameters()))


def _is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor; importing that class takes as long as starting a small run."""
    return hasattr(tensor, "to_local")


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """(first, end) of the rows of a tensor that this rank holds."""
    if not _is_sharded_tensor(tensor):
        return 0, tensor.shape[0]
    each = -(-tensor.shape[0] // collectives.world_size())
    first = min(collectives.rank() * each, tensor.shape[0])
    return first, min(first + each, tensor.shape[0])


def full_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors on rank 0, empty ones elsewhere; tensors that are tied stay tied."""
    found: dict[int, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if id(tensor) not in found:
            full = tensor.full_tensor() if _is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]
            found[id(tensor)] = full.cpu() if collectives.rank() == 0 else full.new_empty(0)
        result[name] = found[id(tensor)]
    return result
