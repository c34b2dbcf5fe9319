"""Rewards and values: a scalar head on a trunk's hidden states, at the last token or before every response token."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.fsdp_root import with_gathered_weights
from .logprobs import Sequences, lay_out, response_rows, shared_values, token_logps, trunk_states
from .probes import trunk_of
from .routing import RoutedTokens
from .shared_weights import copy_sharing_frozen


def last_token_rewards(model: PreTrainedModel, sequences: Sequences, routed: RoutedTokens | None = None) -> Tensor:
    """Rewards [B] float32 of a sequence classifier with one label at each sequence's last token; differentiable.

    The shift and scale of its config are not applied: training uses the raw output. `routed` records the routing of a
    mixture of experts.
    """

    return with_gathered_weights(model, partial(_last_token_rewards, model, sequences, routed))


def _last_token_rewards(model: PreTrainedModel, sequences: Sequences, routed: RoutedTokens | None) -> Tensor:
    layout = lay_out([model], sequences, whole=True, routed=routed)
    return model.score(trunk_states(model, layout)[layout.ends])[:, 0].float()


def rewards_of(
    model: PreTrainedModel,
    sequences: Sequences,
    *,
    tokens_per_batch: int,
    after_round: Callable[[], None] = lambda: None,
) -> Tensor:
    """Rewards [N] float32 on the CPU; micro-batches, ranks and `after_round` are those of `shared_values`."""
    return shared_values(model, sequences, last_token_rewards, tokens_per_batch, after_round)


class ActorCritic(nn.Module):
    """A policy and its value function: a linear head on a separate trunk, or on the policy's where `trunk` is None."""

    def __init__(self, policy: PreTrainedModel, trunk: nn.Module | None, head: nn.Linear):
        super().__init__()
        self.policy, self.trunk, self.head = policy, trunk, head

    def forward(
        self, sequences: Sequences, temperature: float, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(log-probs [N], values [N], entropies [N] or None, owner [N]) at the response tokens of a micro-batch.

        The value of a token is read where it is predicted, one position before it. Entropies carry no gradient.
        """
        layout = lay_out([self.policy] if self.trunk is None else [self.policy, self.trunk], sequences)
        if self.trunk is None:
            states = trunk_states(self.policy, layout)
            rows = response_rows(self.policy, layout, states=states)
        else:
            states = trunk_states(self.trunk, layout)
            rows = response_rows(self.policy, layout)
        before = states.index_select(0, layout.at)
        logps, entropies = token_logps(self.policy, rows, layout.targets, temperature, entropy=entropy)
        return logps, self.head(before.to(self.head.weight.dtype))[:, 0].float(), entropies, layout.owner


def make_critic(policy: PreTrainedModel, kind: str, reward_model: PreTrainedModel | None = None) -> ActorCritic:
    """The policy with a value function, on a `shared` or `separate` trunk.

    A separate one starts from the reward model where one is given: its trunk, and its head with shift and scale folded
    in. Otherwise the trunk is a copy of the policy's and the head starts at 0.
    """
    device = next(policy.parameters()).device
    if kind == "separate" and reward_model is not None:
        config = reward_model.config
        shift, scale = getattr(config, "reward_shift", 0.0), getattr(config, "reward_scale", 1.0)
        head = nn.Linear(reward_model.score.weight.shape[1], 1, device=device)
        with torch.no_grad():
            head.weight.copy_(reward_model.score.weight / scale)
            head.bias.fill_(-shift / scale)
        trunk = copy_sharing_frozen(trunk_of(reward_model))
        # of a trunk that shares the policy's base only its own weights and its buffers are elsewhere
        elsewhere = any(t.device != device for t in (*trunk.parameters(), *trunk.buffers()))
        return ActorCritic(policy, trunk.to(device) if elsewhere else trunk, head)
    width = policy.get_output_embeddings().weight.shape[1]
    head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return ActorCritic(policy, copy_sharing_frozen(trunk_of(policy)) if kind == "separate" else None, head)
