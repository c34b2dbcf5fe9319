"""The most probable tokens at each place of responses, with their log-probs, by one forward pass."""

from itertools import islice

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .logprobs import Sequences, lay_out, micro_batches, response_rows
from .perturbation import next_logits

_TOKENS_PER_BATCH = 16384
_ROWS = 128  # of which the logits over the vocabulary are in memory at a time


@torch.no_grad()
def most_probable(
    model: PreTrainedModel, sequences: Sequences, count: int, temperature: float = 1.0
) -> list[list[dict[int, float]]]:
    """For each sequence and token of its response: {id: log-prob} of the `count` most probable tokens and of its own.

    Logits are divided by `temperature`.
    """
    found: list[list[dict[int, float]]] = [[] for _ in sequences]
    for indices in micro_batches(sequences, _TOKENS_PER_BATCH):
        members = [sequences[i] for i in indices]
        layout = lay_out([model], members)
        rows, each = response_rows(model, layout), []
        for states, targets in zip(rows.split(_ROWS), layout.targets.split(_ROWS), strict=True):
            logps = F.log_softmax(next_logits(model, states).float() / temperature, dim=-1)
            values, ids = logps.topk(min(count, logps.shape[-1]))
            own = logps.gather(1, targets[:, None])
            entries = zip(ids.tolist(), values.tolist(), targets.tolist(), own[:, 0].tolist(), strict=True)
            each += [{target: logp} | dict(zip(top, of_top, strict=True)) for top, of_top, target, logp in entries]
        of_tokens = iter(each)
        for i, (ids_of, start) in zip(indices, members, strict=True):
            found[i] = list(islice(of_tokens, len(ids_of) - start))
    return found
