"""The FLOPs of a model's forward and backward passes over packed sequences, as model FLOP utilisation counts them.

A product of [n, a] and [a, b] has 2 n a b. Counted are linear layers, the head where it is applied, and attention over
the pairs of tokens that see each other; not what activation checkpointing recomputes, nor embeddings and norms.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..data.gaps import size
from .logprobs import Sequences
from .packed import group_by_prompt


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a forward pass (`layers`, `head`: for a token; `pair`: for a query and a key) and of its backward pass.

    The backward pass of a layer takes as many again for the gradient of its input, and for that of its weights where
    they are trained.
    """

    width: int
    layers: int
    layers_back: int
    head: int
    head_back: int
    pair: int

    def of_update(self, sequences: Sequences, *, whole: bool = False) -> int:
        """Forward and backward pass over a micro-batch; with `whole` last tokens are forwarded, and no head is used."""
        tokens, rows, pairs = sizes(sequences, self.width, whole=whole)
        head = 0 if whole else self.head + self.head_back
        return tokens * (self.layers + self.layers_back) + rows * head + 3 * pairs * self.pair


def model_flops(model: PreTrainedModel) -> ModelFlops:
    """What the layers of a model cost; adapters are layers like others."""
    config = model.config.get_text_config()
    output = model.get_output_embeddings()  # of a trunk None
    layers, back = 0, 0
    for module in model.modules():
        if module is output:
            continue
        size, trained = _products(module, config)
        layers += 2 * size
        back += 2 * (size + trained)
    head = 0 if output is None else 2 * output.weight.numel()
    learns = output is not None and output.weight.requires_grad
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    pair = 4 * heads * width * config.num_hidden_layers
    return ModelFlops(config.hidden_size, layers, back, head, head * (2 if learns else 1), pair)


def _products(module: nn.Module, config: Any) -> tuple[int, int]:
    """(weights with which a module multiplies each token, those of them that are trained)."""
    if isinstance(module, (nn.Linear, Conv1D)):  # not peft's Linear, which has a layer and its adapters as parts
        weight: Any = module.weight
        size = getattr(module, "in_features", 0) * getattr(module, "out_features", 0) or weight.numel()
        return size, size if weight.requires_grad else 0
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        return 0, 0
    found = [p for p in module.parameters(recurse=False) if p.ndim == 3]  # [experts, in, out]
    sizes_of = [p.numel() // p.shape[0] * chosen for p in found]
    return sum(sizes_of), sum(n for n, p in zip(sizes_of, found, strict=True) if p.requires_grad)


def sizes(sequences: Sequences, width: int, *, whole: bool = False) -> tuple[int, int, int]:
    """(tokens forwarded, response tokens, pairs of tokens of which one sees the other) of a packed micro-batch.

    `width` is the model's hidden size, on which it depends whether a prompt is shared.
    """
    tokens = pairs = 0
    for members in group_by_prompt(sequences, width):
        start = sequences[members[0]][1]
        tokens, pairs = tokens + start, pairs + start * (start + 1) // 2
        for i in members:
            tail = len(sequences[i][0]) - start - (not whole)
            tokens, pairs = tokens + tail, pairs + tail * start + tail * (tail + 1) // 2
    return tokens, sum(map(size, sequences)), pairs
