"""Rewards and values: a scalar head on a trunk's hidden states, at the last token or before every response token."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .logprobs import Sequences, lay_out, micro_batches, response_rows, token_logps


def last_token_rewards(model, texts: Sequence[Sequence[int]]) -> Tensor:
    """Rewards [B] float32 of a sequence classifier with one label at each text's last token; differentiable.

    Without the shift and scale of its config: what training works on. Padded on the right, as `transformers` does it.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(ids) for ids in texts])
    padded = torch.full((len(texts), int(lengths.max())), model.config.get_text_config().pad_token_id)
    for row, ids in enumerate(texts):
        padded[row, : len(ids)] = torch.tensor(ids)
    hidden = model.base_model(input_ids=padded.to(device), use_cache=False).last_hidden_state
    return model.score(hidden[torch.arange(len(texts)), (lengths - 1).to(device)])[:, 0].float()


@torch.no_grad()
def rewards_of(model, texts: Sequence[Sequence[int]], *, tokens_per_batch: int) -> Tensor:
    """Rewards [N] float32 on the CPU, in micro-batches of similar length."""
    result = torch.empty(len(texts))
    for indices in micro_batches([len(ids) for ids in texts], tokens_per_batch):
        result[indices] = last_token_rewards(model, [texts[i] for i in indices]).cpu()
    return result


class ActorCritic(nn.Module):
    """A policy and its value function: a linear head on a trunk of its own, or (trunk None) on the policy's."""

    def __init__(self, policy, trunk: nn.Module | None, head: nn.Linear):
        super().__init__()
        self.policy, self.trunk, self.head = policy, trunk, head

    def forward(self, sequences: Sequences, temperature: float, *, entropy: bool = False):
        """(log-probs [N], values [N], entropies [N] or None, owner [N]) at the response tokens of a micro-batch.

        The value of a token is read where it is predicted, one position before it. Entropies carry no gradient.
        """
        layout = lay_out(self.policy, sequences)
        if self.trunk is None:
            hidden = self.policy.base_model(input_ids=layout.ids, use_cache=False).last_hidden_state
            seen = hidden[layout.owner, layout.column - 1]
            rows = response_rows(self.policy, layout, hidden=hidden)
        else:
            rows = response_rows(self.policy, layout)
            hidden = self.trunk(input_ids=layout.ids, use_cache=False).last_hidden_state
            seen = hidden[layout.owner, layout.column - 1]
        logps, entropies = token_logps(self.policy, rows, layout.targets, temperature, entropy=entropy)
        return logps, self.head(seen.to(self.head.weight.dtype))[:, 0].float(), entropies, layout.owner


def make_critic(policy, kind: str, reward_model=None) -> ActorCritic:
    """The policy with a value function: `shared` trunk or `separate`, from the reward model where there is one.

    A reward model gives trunk and head, its shift and scale folded into the head; otherwise the trunk is a copy of the
    policy's and the head starts at 0.
    """
    device = next(policy.parameters()).device
    if kind == "separate" and reward_model is not None:
        config = reward_model.config
        shift, scale = getattr(config, "reward_shift", 0.0), getattr(config, "reward_scale", 1.0)
        head = nn.Linear(reward_model.score.weight.shape[1], 1)
        with torch.no_grad():
            head.weight.copy_(reward_model.score.weight / scale)
            head.bias.fill_(-shift / scale)
        return ActorCritic(policy, copy.deepcopy(reward_model.base_model).to(device), head.to(device))
    width = policy.get_output_embeddings().weight.shape[1]
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    trunk = copy.deepcopy(policy.base_model) if kind == "separate" else None
    return ActorCritic(policy, trunk, head.to(device))
