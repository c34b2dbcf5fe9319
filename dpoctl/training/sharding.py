"""A model's weights, gradients and optimizer state shared among ranks by torch's FSDP2, one block at a time whole."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.blocks import blocks
from ..models.logprobs import can_pack, has_plain_head
from ..models.within import Root, is_sharded, put_within
from . import runtime


def shard(model, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model in place: float32 shards, computed in `dtype`, gradients summed in float32 over the ranks.

    Raises InputError for an architecture that names no blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    can_pack(model)  # tried, as the plain head is, while the weights are whole
    has_plain_head(model)
    mesh = init_device_mesh(device.type, (runtime.world_size(),))
    precision = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    root = Root(model)
    for module in [*blocks(model), root]:
        # the root too is sharded again behind its forward, so that its weights are never stale, and saved as they are
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the losses are shares of the global mean already: a sum
        module.set_force_sum_reduction_for_comms(True)  # and as such, which gloo has too
    put_within(model, root)


def even(model, micros: Sequence[Any], idle: Callable[[], Any]) -> Iterator[Any]:
    """This rank's micro-batches; of a sharded model then `idle()` until every rank has run as many: they gather together."""
    most = max(runtime.gather(len(micros))) if is_sharded(model) else len(micros)
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
    each = -(-tensor.shape[0] // runtime.world_size())
    first = min(runtime.rank() * each, tensor.shape[0])
    return first, min(first + each, tensor.shape[0])


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on rank 0 (elsewhere nothing is kept); equal ones stay one."""
    found: dict[int, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if id(tensor) not in found:
            full = tensor.full_tensor() if _is_shared(tensor) else tensor
            found[id(tensor)] = full.cpu() if runtime.rank() == 0 else full.new_empty(0)
        result[name] = found[id(tensor)]
    return result
