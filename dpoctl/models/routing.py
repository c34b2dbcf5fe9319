"""The load-balancing loss of mixtures of experts (2101.03961, eq. 4), over the tokens of a whole update.

With f_e the share of tokens that are routed to expert e and P_e the mean of its probabilities, over all tokens and
layers, the loss of E experts is E * sum_e f_e P_e. f has no gradient, so that where f and the number of tokens are
known for the whole update, the loss is a sum over tokens, and micro-batches add their shares of it. A text counts as
often as the update's loss contains it, and a packed prompt once for each of its completions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .probes import trunk_of


def routing_options(model: PreTrainedModel) -> tuple[float, int] | None:
    """(router_aux_loss_coef, experts per token) of the configuration; None for a model without such a loss."""
    config = model.config.get_text_config()
    coefficient, top_k = (getattr(config, name, None) for name in ("router_aux_loss_coef", "num_experts_per_tok"))
    return None if coefficient is None or not isinstance(top_k, int) else (float(coefficient), top_k)


class RoutedTokens:
    """Sums over the tokens of forward passes: how often each expert was chosen [E], its probabilities [E], tokens.

    `counts`: how often each sequence of the micro-batch counts.
    """

    def __init__(self, counts: list[float], top_k: int):
        self.counts, self.top_k = counts, top_k
        self.chosen: Tensor | None = None
        self.probabilities: Tensor | None = None
        self.tokens = 0.0

    def add(self, router_logits: tuple[Tensor, ...], weights: Tensor) -> None:
        """Add a forward pass: each layer's logits [tokens, E], and how often each token counts [tokens]."""
        for logits in router_logits:
            each = logits.reshape(-1, logits.shape[-1]).softmax(-1).float()
            chosen = torch.zeros_like(each).scatter_(1, each.topk(self.top_k, dim=-1).indices, 1.0)
            weighted = weights.to(each.device, each.dtype)[:, None]
            # .detach(): the choice has no gradient
            self.chosen = _sum(self.chosen, (chosen * weighted).sum(0).detach())
            self.probabilities = _sum(self.probabilities, (each * weighted).sum(0))
            self.tokens += float(weights.sum())

    def totals(self) -> Tensor:
        """[E + 1] float64: how often each expert was chosen, and the tokens; they add up over batches."""
        assert self.chosen is not None, "no forward pass has been recorded"
        chosen = self.chosen.double()
        return torch.cat([chosen, chosen.new_full((1,), self.tokens)])

    def loss(self, totals: Tensor) -> Tensor:
        """This part's share of the loss of an update with these totals; differentiable."""
        assert self.probabilities is not None, "no forward pass has been recorded"
        share = (totals[:-1] / totals[-1] ** 2).to(self.probabilities.device, torch.float32)
        return len(share) * (share * self.probabilities).sum()


def _sum(known: Tensor | None, new: Tensor) -> Tensor:
    return new if known is None else known + new


@contextmanager
def recorded(model: PreTrainedModel, routed: RoutedTokens, weights: Tensor) -> Iterator[None]:
    """Record the routing of the one forward pass in the block, whose tokens count as often as `weights` says."""
    trunk = trunk_of(model)

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_router_logits": True}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        routed.add(output.router_logits, weights)

    hooks = [trunk.register_forward_pre_hook(ask, with_kwargs=True), trunk.register_forward_hook(keep)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
