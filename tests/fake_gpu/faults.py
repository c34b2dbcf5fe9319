"""Faults that the fake device must find, put into dpoctl by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.nn.attention import flex_attention as flex

from dpoctl.models import logprobs
from dpoctl.training import dpo


def _targets_on_the_cpu() -> None:
    own = logprobs.lay_out
    logprobs.lay_out = lambda *args, **kw: (found := own(*args, **kw)) and replace(found, targets=found.targets.cpu())


def _keys_in_another_dtype() -> None:
    """As models with rotary positions under autocast leave them."""
    own = flex.flex_attention
    flex.flex_attention = lambda query, key, value, *args, **kw: own(query, key.double(), value, *args, **kw)


def _a_wait_in_the_loss() -> None:
    own = dpo.DPO.loss

    def loss(self: Any, micro: Any) -> Any:
        found = own(self, micro)
        found[0].item()
        return found

    dpo.DPO.loss = loss


FAULTS: dict[str, Callable[[], None]] = {
    "targets on the CPU": _targets_on_the_cpu,
    "keys in another dtype": _keys_in_another_dtype,
    "a wait in the loss": _a_wait_in_the_loss,
}
