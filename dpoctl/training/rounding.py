"""How much of a run survives the precision in which its weights are saved, measured on a sample of them."""

import torch
from torch import nn

from .. import log
from ..runtime import fsdp

_SAMPLE = 1 << 16  # weights
_ENOUGH = 0.9


class SavedChanges:
    """A sample of a model's trained weights before training, to be compared with the same weights when they are saved.

    bfloat16 has 8 bits of precision: a weight that moves by less than about 0.2 % is saved as it was.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        draw = torch.Generator().manual_seed(0)
        sizes = [part.numel() for part in self._parts()]
        total = max(1, sum(sizes))
        counts = [min(size, -(-_SAMPLE * size // total)) for size in sizes]
        self.places = [torch.randint(0, max(1, n), (k,), generator=draw) for n, k in zip(sizes, counts, strict=True)]
        self.before = self._values()

    def warn(self) -> float | None:
        """The share of the changed weights that are saved changed; warns where it is small. None: nothing changed."""
        after = self._values()
        changed = after != self.before
        if not changed.any():
            return None
        kept = (after.to(self.dtype) != self.before.to(self.dtype)) & changed
        share = kept.sum().item() / changed.sum().item()
        name = str(self.dtype).removeprefix("torch.")
        said = f"--save-dtype {name}: {100 * share:.2g} % of the weights that training changed are saved changed"
        if share < _ENOUGH:
            log.warn(f"{said}, the others are rounded back to what they were; --save-dtype float32 keeps all")
        else:
            log.say(said)
        return share

    @torch.no_grad()
    def _values(self) -> torch.Tensor:
        values = [part.flatten()[at.to(part.device)].cpu() for part, at in zip(self._parts(), self.places, strict=True)]
        return torch.cat(values) if values else torch.empty(0)

    def _parts(self) -> list[torch.Tensor]:
        return [fsdp.local_part(p.detach()) for p in self.model.parameters() if p.requires_grad]
