"""Log-probs by a model's own forward, one text at a time, as a reference; and texts for them."""

import random

import torch

Sequences = list[tuple[list[int], int]]


def one_by_one(model, sequences: Sequences) -> torch.Tensor:
    """Summed log-probs [N] of (ids, start of the response) in the dtype of the logits: each text alone."""
    sums = []
    for ids, start in sequences:
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(logps[range(start - 1, len(ids) - 1), ids[start:]].sum())
    return torch.stack(sums)


def random_sequences(tokens: int, draw: random.Random, names: range) -> Sequences:
    """Prompts with one to four answers, of about so many tokens, with ids among `names`."""
    found: Sequences = []
    while tokens > 0:
        prompt = draw.choices(names, k=draw.randint(3, 60))
        tokens -= len(prompt)
        for _ in range(draw.randint(1, 4)):
            answer = draw.choices(names, k=draw.randint(1, 90))
            found.append((prompt + answer, len(prompt)))
            tokens -= len(answer)
    return found
