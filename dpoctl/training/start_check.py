"""Whether the first batch's log-probs are right before anything is learnt, within a bound from measured rounding.

In float32 a probe of the model compares a packed row with a padded batch closely. In bfloat16 log-probs are sums of
rounding errors, whose size depends on the model, so that it is measured: the same texts are forwarded alone in float32
and in bfloat16, and in a padded batch. None of these is packed, so that their differences are rounding alone, and bound
how far a packed row, or a reference that was packed otherwise, may be off. Errors grow with the root of the tokens.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.gaps import size
from ..errors import NumericalError
from ..models.logprobs import Sequences, summed_logps
from ..models.precision import full_precision
from ..models.probes import without_packing
from ..runtime import collectives, fsdp
from ..runtime.devices import Compute
from ..runtime.fsdp_root import is_sharded

_MEASURED = 8  # texts of each rank
# Times the measured rms. The largest of some hundred normal errors is four times their rms, a difference of two such
# log-probs 1.4 times as large, and the rms of eight texts may be a third too small.
_MARGIN = 10
# The least bound, in nats by the root of the tokens; with sharded weights, which float32 cannot be had of, for models
# of any size. On GPT-2 models of 1 and 7 million weights rounding was at most 0.006 and 0.019, and a branch that sees
# its sibling 0.4 and 3.7.
_LEAST, _LEAST_SHARDED = 0.02, 0.15


@dataclass(frozen=True)
class Rounding:
    """What batching changes, in nats by the root of a text's tokens: the bound, and how far packing was off."""

    bound: float
    packed: float

    def require_right_packing(self) -> None:
        """Raise NumericalError where packing changes more than rounding does."""
        if not self.packed <= self.bound:  # NaN too
            raise NumericalError(
                f"log-probs of the first batch's packed row differ from those of each text alone by {self.packed:.2g} "
                f"nats by the root of its tokens; rounding explains {self.bound:.2g}",
                hint="attention over packed rows is wrong on this device: please report it with the output of "
                "dpoctl env. --dtype float32 or another device may help",
            )


@torch.no_grad()
def measure(model: Any, sequences: Sequences, compute: Compute, dummy: Callable[[], Any]) -> Rounding:
    """The rounding of some texts in the compute dtype, over all ranks. Called on every rank.

    `dummy()`: what a rank with fewer texts forwards in their place.
    """
    texts = list(sequences[:_MEASURED])
    batches = [texts] if texts else []
    root = torch.tensor([size(text) for text in texts], dtype=torch.float64).sqrt()
    with compute.autocast():
        packed = _run(model, batches, dummy)
        with without_packing(model):
            alone = _run(model, [[text] for text in texts], dummy)
            others = [_run(model, batches, dummy)]
    if not is_sharded(model):
        with without_packing(model), full_precision(model, compute.device):
            others.append(_run(model, [[text] for text in texts], dummy))
    squares = [float(((other - alone) / root).square().sum()) for other in others]
    worst = float(((packed - alone) / root).abs().amax()) if texts else 0.0
    found = collectives.gather((squares, len(texts), worst))
    count = max(1, sum(n for _, n, _ in found))
    rms = max(math.sqrt(sum(ranks) / count) for ranks in zip(*(s for s, _, _ in found), strict=True))
    least = _LEAST_SHARDED if is_sharded(model) else _LEAST
    return Rounding(max(least, _MARGIN * rms), highest(w for _, _, w in found))


def highest(values: Iterable[float]) -> float:
    """The largest of some values, NaN where one is; 0 without any. `max` forgets a NaN that is not the first."""
    return float(torch.tensor([0.0, *values], dtype=torch.float64).max())


def _run(model: Any, batches: list, dummy: Callable[[], Any]) -> Tensor:
    """[texts] float64 on the CPU: summed log-probs of the texts of some batches."""
    found = [summed_logps(model, batch) for batch in fsdp.in_lockstep(model, batches, dummy)]
    return torch.cat(found).double().cpu() if found else torch.zeros(0, dtype=torch.float64)
