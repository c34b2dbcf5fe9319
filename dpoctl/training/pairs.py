"""Preference pairs as training batches in which every completion is forwarded once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.batching import Stream, pack, permutation, share, shuffled, shuffled_groups
from ..data.encode import PairData
from ..data.gaps import sequence_of
from ..errors import InputError


class StreamOptions(Protocol):
    """The options that pair_stream reads."""

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...


@dataclass(frozen=True)
class PairBatch:
    """Pairs over unique completions: `completions` [C] indices into the data, `pairs` [P, 2] indices into those."""

    completions: list[int]
    pairs: Tensor
    n_global: int  # pairs of the whole update, over which the loss is averaged
    rows: list[int]  # which pairs of the data they are


def sequences(data: PairData) -> list[tuple[Sequence[int], int]]:
    """(prompt + completion ids, start of the completion) of every unique completion, with its gaps."""
    each = enumerate(zip(data.prompt_of, data.completions, strict=True))
    return [sequence_of(data.prompts[p], c, data.gaps.get(i, ())) for i, (p, c) in each]


def pair_stream(data: PairData, options: StreamOptions, shuffle: str = "prompts") -> Stream:
    """Batches of pairs in random order: by prompts, so that a prompt's pairs share a batch, or pair by pair."""
    prompt_of_pair = [data.prompt_of[chosen] for chosen, _ in data.pairs]
    order = (
        shuffled_groups(options.seed, prompt_of_pair)
        if shuffle == "prompts"
        else shuffled(options.seed, len(data.pairs))
    )
    return Stream(len(data.pairs), options.batch_size, options.epochs, options.max_steps, order)


def split_by_prompt(data: PairData, held_out: float, seed: int) -> tuple[PairData, PairData]:
    """(training, validation) pairs that share no prompt; `held_out` is the share of prompts, one at least.

    Raises InputError where there is only one prompt.
    """
    if len(data.prompts) < 2:
        raise InputError("validation is split by prompt, and there is only one", hint="give --eval-data")
    count = min(len(data.prompts) - 1, max(1, round(held_out * len(data.prompts))))
    held = set(permutation(seed, 0, len(data.prompts))[:count].tolist())
    is_held = [data.prompt_of[chosen] in held for chosen, _ in data.pairs]
    return only(data, [i for i, h in enumerate(is_held) if not h]), only(data, [i for i, h in enumerate(is_held) if h])


def without_prompts(data: PairData, other: PairData) -> PairData:
    """The pairs of `data` whose prompt is not among those of `other`'s pairs."""
    known = {tuple(other.prompts[other.prompt_of[chosen]]) for chosen, _ in other.pairs}
    return only(data, [i for i, (c, _) in enumerate(data.pairs) if tuple(data.prompts[data.prompt_of[c]]) not in known])


def only(data: PairData, pairs: list[int]) -> PairData:
    """The same completions with fewer pairs."""
    names = ("pairs", "lines", "margins", "scores", "shares", "weights", "labels", "mismatched")
    kept: dict[str, Any] = {name: [values[i] for i in pairs] for name in names if (values := getattr(data, name))}
    return replace(data, **kept)


def micro_batches(data: PairData, pairs: list[int], tokens: int, rank: int = 0, world: int = 1) -> list[PairBatch]:
    """This rank's micro-batches of a global batch of pairs.

    Pairs of one prompt stay together, so that each completion is forwarded once however many of them it is in.
    """
    units: dict[int, list[int]] = {}
    for pair in pairs:
        units.setdefault(data.prompt_of[data.pairs[pair][0]], []).append(pair)
    held = {p: sorted({i for pair in unit for i in data.pairs[pair]}) for p, unit in units.items()}
    lengths = {p: [len(data.completions[i]) for i in completions] for p, completions in held.items()}
    size = {p: len(data.prompts[p]) + sum(lengths[p]) for p in units}
    width = {p: len(data.prompts[p]) + max(lengths[p]) for p in units}
    shared = share(list(units), size.__getitem__, rank, world)
    return [
        _batch(data, [pair for p in group for pair in units[p]], len(pairs))
        for group in pack(shared, size.__getitem__, width.__getitem__, tokens)
    ]


def _batch(data: PairData, pairs: list[int], n_global: int) -> PairBatch:
    completions = list(dict.fromkeys(i for pair in pairs for i in data.pairs[pair]))
    place = {c: i for i, c in enumerate(completions)}
    local = torch.tensor([[place[a], place[b]] for a, b in (data.pairs[pair] for pair in pairs)])
    return PairBatch(completions, local, n_global, pairs)


def batch_tokens(data: PairData, batch: PairBatch) -> int:
    """Tokens of a micro-batch, each prompt counted once."""
    prompts = {data.prompt_of[i] for i in batch.completions}
    return sum(len(data.prompts[p]) for p in prompts) + sum(len(data.completions[i]) for i in batch.completions)


def counts(batch: PairBatch) -> list[float]:
    """In how many pairs of a micro-batch each of its completions is."""
    return torch.bincount(batch.pairs.flatten(), minlength=len(batch.completions)).tolist()
