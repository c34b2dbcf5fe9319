"""The distribution of a policy that is decoded with values, from transformers' hidden states and full logits."""

import torch
from torch import Tensor

from dpoctl.models.ilql import IlqlModel


def perturbed(model: IlqlModel, ids: list[int], beta: float, temperature: float) -> Tensor:
    """[tokens, V] log-probs in float64 of log pi + beta (min Q - V), renormalised, then cooled."""
    with torch.no_grad():
        out = model.policy(torch.tensor([ids]), output_hidden_states=True)
        states, heads = out.hidden_states[-1][0].double(), model.heads

        def of(layer, x: Tensor) -> Tensor:
            return x @ layer.weight.double().T + layer.bias.double()

        q = torch.minimum(*(of(head.out, of(head.hidden, states).relu()) for head in heads.target_q))
        v = of(heads.v[2], of(heads.v[0], states).relu())
        logps = (out.logits[0].double().log_softmax(-1) + beta * (q - v)).log_softmax(-1)
    return (logps / temperature).log_softmax(-1)
