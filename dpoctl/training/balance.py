"""The load-balancing loss as a part of an update: its coefficient, and the routing of the update's whole batch."""

from typing import Any

import torch
from torch import Tensor

from .. import log
from ..errors import InputError
from ..models.logprobs import Sequences, lay_out, trunk_states
from ..models.pretrained import loaded_setting
from ..models.routing import RoutedTokens, routing_options
from ..runtime import collectives, fsdp
from ..runtime.fsdp_root import with_gathered_weights
from .metrics import Sums


def coefficient_of(model: Any, given: float | None) -> float:
    """The coefficient of --router-aux-loss-coef, else the configuration's where it asks for the loss; said.

    Raises InputError for a model without the loss, where the option is given.
    """
    known = routing_options(model)
    if known is None:
        if given is not None:
            raise InputError(
                "--router-aux-loss-coef has no effect: the model's config.json has no router_aux_loss_coef",
                hint="leave it out, or give a mixture of experts",
            )
        return 0.0
    asked = bool(loaded_setting(model, "output_router_logits"))
    found = given if given is not None else known[0] if asked else 0.0
    if found:
        log.say(f"mixture of experts: the load-balancing loss is part of the loss, with coefficient {found:g}")
    elif known[0] and given is None:
        log.say(
            f"mixture of experts: without the load-balancing loss (--router-aux-loss-coef {known[0]:g} adds it), "
            "since its configuration has output_router_logits false"
        )
    return found


def say_left_out(model: Any) -> None:
    """Say that a command trains without the load-balancing loss that the configuration asks for."""
    known = routing_options(model)
    if known and known[0] and loaded_setting(model, "output_router_logits"):
        log.say("mixture of experts: PPO trains without the load-balancing loss that its configuration asks for")


class Balance:
    """The load-balancing loss of a task's updates; without effect where the coefficient is 0."""

    def __init__(self, model: Any, coefficient: float):
        self.model, self.coefficient = model, coefficient
        self.totals: Tensor | None = None
        options = routing_options(model)
        self.top_k = options[1] if options else 0

    def begin(self, task: Any, micros: list[Any]) -> None:
        """Measure the routing of an update's batch where it is forwarded in several parts. Called on every rank."""
        self.totals = None
        if not self.coefficient or (collectives.world_size() == 1 and len(micros) == 1):
            return
        totals = torch.zeros(0)
        with torch.no_grad(), task.compute.autocast():
            for micro in fsdp.in_lockstep(self.model, micros, task.dummy_loss):
                found = self._route(*task.texts(micro)).totals()
                totals = found if totals.numel() == 0 else totals + found
        size = max(collectives.gather(totals.numel()))  # 0 on a rank without micro-batches
        mine = totals.cpu() if totals.numel() else torch.zeros(size, dtype=torch.float64)
        self.totals = collectives.sum_over_ranks(mine)

    def watch(self, counts: list[float]) -> RoutedTokens | None:
        """What a forward pass records its routing in; `counts` says how often each of its texts counts."""
        return RoutedTokens(counts, self.top_k) if self.coefficient else None

    def loss(self, routed: RoutedTokens | None, share: float) -> tuple[Tensor | float, Sums]:
        """(a micro-batch's part of the loss, what is logged); `share` of the update's rows are in the micro-batch."""
        if routed is None:
            return 0.0, {}
        value = routed.loss(routed.totals() if self.totals is None else self.totals)
        return self.coefficient * value, {"router_aux_loss": (value.detach(), share)}

    def _route(self, sequences: Sequences, counts: list[float]) -> RoutedTokens:
        routed = RoutedTokens(counts, self.top_k)

        def forward() -> None:
            trunk_states(self.model, lay_out([self.model], sequences, routed=routed))

        with_gathered_weights(self.model, forward)
        return routed
