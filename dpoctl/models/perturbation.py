"""The logits of the next token, of a model that is decoded with values beside its own head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tiled_head
from .probes import has_plain_head


@dataclass(frozen=True)
class Perturbation:
    """`logits(rows, logits)`: the logits [N, V] to decode with, from last hidden states [N, d] and a model's logits.

    `weights`: with how many weights it multiplies a token.
    """

    logits: Callable[[Tensor, Tensor], Tensor]
    weights: int


def perturb(model: Any, perturbation: Perturbation | None) -> None:
    """Let a model be decoded and compared with these logits; its head must be plain (`has_plain_head`).

    None: with those of its own head alone.
    """
    if perturbation and not has_plain_head(model):
        raise ValueError("the logits of a model without a plain head are not known from its hidden states")
    model._dpoctl_perturbation = perturbation


def perturbation_of(model: Any) -> Perturbation | None:
    """What a model is decoded with beside its own head."""
    return getattr(model, "_dpoctl_perturbation", None)


@torch.no_grad()
def next_logits(model: Any, rows: Tensor) -> Tensor:
    """[N, V] logits of the next token from last hidden states [N, d] (or logits, see `has_plain_head`)."""
    if not has_plain_head(model):
        return rows
    logits = tiled_head.logits(model.get_output_embeddings(), rows)
    perturbation = perturbation_of(model)
    return logits if perturbation is None else perturbation.logits(rows, logits)
