"""A model's weights, gradients and optimizer state shared among ranks by torch's FSDP2, one block at a time whole."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from . import collectives
from .fsdp_root import FsdpRoot, attach_root, is_sharded


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model in place: float32 shards, computed in `dtype`, gradients summed in float32 over the ranks.

    Rank 0 has it whole; on the others its weights may be on the meta device: only their shares ever have memory.
    `blocks` are sharded one by one. Raises InputError for weights whose shapes or ties are not those of the configuration.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shapes = collectives.gather([(name, tuple(t.shape)) for name, t in _tensors(model).items()])
    if any(other != shapes[0] for other in shapes):
        hint = "save it anew by save_pretrained, with the tie_word_embeddings that its weights have"
        raise InputError(f"{type(model).__name__}: its weights are not those that its config.json describes", hint)
    numbers = _tensors(model) if collectives.rank() == 0 else {}
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    precision = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    root = FsdpRoot(model)
    for module in [*blocks, root]:
        # the root too is sharded again behind its forward, so that its weights are never stale, and saved as they are
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the losses are shares of the global mean already: a sum
        module.set_force_sum_reduction_for_comms(True)  # and as such, which gloo has too
    attach_root(model, root)
    if any(t.is_meta for t in _tensors(model).values()):
        model.to_empty(device=device)
    for name, target in _tensors(model).items():
        full = numbers.pop(name).to(device) if numbers else torch.empty(target.shape, dtype=target.dtype, device=device)
        dist.broadcast(full, 0)
        if _is_shared(target):
            first, behind = rows_of(target)
            full = full[first:behind]
        own(target).copy_(full)


def _tensors(model) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not saved too."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def in_lockstep(model, micros: Sequence[Any], idle: Callable[[], Any]) -> Iterator[Any]:
    """This rank's micro-batches; of a sharded model then `idle()` until every rank has run as many: they gather together."""
    most = max(collectives.gather(len(micros))) if is_sharded(model) else len(micros)
    yield from micros
    for _ in range(most - len(micros)):
        idle()


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if _is_shared(tensor) else tensor


def _is_shared(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose import costs as long as a small run's start."""
    return hasattr(tensor, "to_local")


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """(first, behind the last) of the rows of a tensor that this rank holds."""
    if not _is_shared(tensor):
        return 0, tensor.shape[0]
    each = -(-tensor.shape[0] // collectives.world_size())
    first = min(collectives.rank() * each, tensor.shape[0])
    return first, min(first + each, tensor.shape[0])


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on rank 0 (elsewhere nothing is kept); equal ones stay one."""
    found: dict[int, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if id(tensor) not in found:
            full = tensor.full_tensor() if _is_shared(tensor) else tensor
            found[id(tensor)] = full.cpu() if collectives.rank() == 0 else full.new_empty(0)
        result[name] = found[id(tensor)]
    return result
