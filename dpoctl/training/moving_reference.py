"""A reference that follows the policy (TR-DPO, 2404.09656): every few updates it becomes a mixture of both."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime import fsdp


class MovingReference:
    """A reference in memory, with float32 weights, and its moves: reference <- mix policy + (1 - mix) reference.

    Raises InputError where the weights of policy and reference do not correspond.
    """

    def __init__(self, model: Any, policy: nn.Module, mix: float, name: str):
        self.model, self.mix = model, mix
        mine, theirs = (dict(m.named_parameters()) for m in (model, policy))
        if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
            raise InputError(
                f"{name}: its weights are not of the policy's shapes, so that it cannot move towards the policy",
                hint="leave --sync-ref-every out, or give a reference of the same architecture",
            )
        model.requires_grad_(False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, as a checkpoint holds them."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def move(self, policy: nn.Module) -> None:
        """Move towards the policy's weights as they are now; each rank moves its shard."""
        theirs = dict(policy.named_parameters())
        for name, mine in self.model.named_parameters():
            ours, target = fsdp.local_part(mine.detach()), fsdp.local_part(theirs[name].detach())
            if self.mix == 1.0:
                ours.copy_(target)
            else:
                ours.lerp_(target.to(ours.dtype), self.mix)
