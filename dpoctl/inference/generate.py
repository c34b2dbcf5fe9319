"""Sample completions from a causal language model, one batch of prompts at a time.

A batch is padded on the left. Each prompt is run once, its cache is copied to its completions, and rows that have ended
leave the batch. A row's random numbers do not depend on the others (`token_sampling`), but rounding depends on what
shares a batch: equal batches give equal bytes, so a resumed or sharded command splits its rows only between batches.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from ..models.load import context_length
from ..models.probes import has_plain_head, trunk_of
from .options import SamplingOptions
from .token_sampling import sample_token, sample_token_from_states, uniforms

_COMPACT_AT = 0.25  # fraction of ended rows in the batch at which they are removed from it


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Temperature 0 is greedy, top_p 1 and top_k 0 exclude nothing, and a text ends before a stop string. `seed` is the
    seed of the random numbers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class Completion:
    """A sampled text, its token ids without the EOS, and how it ended: `stop` (EOS or stop string) or `length`."""

    ids: list[int]
    text: str
    finish: str


def sampling_of(options: SamplingOptions, temperature: float, seed: int, stop: tuple[str, ...] = ()) -> Sampling:
    """How a command's options say to sample, at a temperature."""
    return Sampling(
        temperature=temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        stop=stop,
        seed=seed,
    )


def batch_slices(n_prompts: int, n_per_prompt: int, generation_batch_size: int = 256) -> list[slice]:
    """Slices of consecutive prompts with at most `generation_batch_size` completions each, but at least one prompt."""
    size = max(1, generation_batch_size // n_per_prompt)
    return [slice(start, min(start + size, n_prompts)) for start in range(0, n_prompts, size)]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    prompt_keys: list[str],
    ks: list[int],
    sampling: Sampling,
) -> list[list[Completion]]:
    """Completions number `ks` of every prompt, as one batch: result[i][j] is prompt i's completion ks[j].

    `prompts` are token ids; `prompt_keys` identify them in the random numbers (their prompt_id). The length is bounded
    by `max_new_tokens`, EOS counted, and by the end of the context. The model is expected in eval mode.
    Raises InputError for an empty prompt and one that leaves no room in the context.
    """
    if not prompts or not ks:
        return [[] for _ in prompts]
    limits = _limits(model, prompts, prompt_keys, sampling.max_new_tokens)
    rows = [(i, k) for i in range(len(prompts)) for k in ks]
    steps = max(limits)
    numbers = np.stack([uniforms(sampling.seed, prompt_keys[i], k, steps) for i, k in rows])
    ends, tail = _eos_ids(model, tokenizer), _tail_length(sampling.stop)
    tokens: list[list[int]] = [[] for _ in rows]
    finish = ["length"] * len(rows)

    batch = _DecodingBatch(model, prompts, [i for i, _ in rows], steps)
    states = batch.prefill()
    active = set(range(len(rows)))
    for step in range(steps):
        sampled = _next_tokens(model, states, torch.from_numpy(numbers[batch.rows, step]), sampling).tolist()
        for row, token in zip(batch.rows, sampled, strict=True):
            if row not in active:
                continue
            ended = token in ends
            if not ended:
                tokens[row].append(token)
                ended = bool(tail) and _first_stop(tokenizer.decode(tokens[row][-tail:]), sampling.stop) is not None
            if ended:
                finish[row] = "stop"
                active.remove(row)
            elif len(tokens[row]) == limits[rows[row][0]]:
                active.remove(row)
        if not active:
            break
        states = batch.step(sampled, active)

    completions = iter(
        [
            _completion(tokenizer, prompts[i], ids, end, sampling.stop)
            for (i, _), ids, end in zip(rows, tokens, finish, strict=True)
        ]
    )
    return [[next(completions) for _ in ks] for _ in prompts]


def _next_tokens(model: PreTrainedModel, states: torch.Tensor, u: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[rows] tokens drawn from the last hidden states [rows, d] (or logits, see logprobs.has_plain_head)."""
    plain = has_plain_head(model)
    output = model.get_output_embeddings()
    full = sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p == 1.0
    if plain and full and states.device.type == "cpu" and output.bias is None and states.dtype == output.weight.dtype:
        return sample_token_from_states(states, output.weight, u, sampling.temperature)
    logits = output(states) if plain else states
    u = u.to(logits.device)
    return sample_token(logits, u, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)


class _DecodingBatch:
    """The rows that are being decoded, with their cache, mask and positions."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], prompt_of: list[int], steps: int):
        self.model, self.device = model, model.device
        self.rows = list(range(len(prompt_of)))
        self.context = context_length(model)
        self.width = max(map(len, prompts))
        # Each distinct prompt is run once: `source` is, for each row, the line of the prefill that it copies.
        self.unique: list[tuple[int, ...]] = list(dict.fromkeys(map(tuple, prompts)))
        place = {ids: n for n, ids in enumerate(self.unique)}
        self.source = torch.tensor([place[tuple(prompts[i])] for i in prompt_of], device=self.device)
        self.mask = torch.ones(len(self.unique), self.width + steps, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(len(self.rows), 1, dtype=torch.long, device=self.device)
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [  # other kinds of layer, such as sliding windows, are kept
            _PreallocatedLayer(self.width + steps) if type(layer) is DynamicLayer else layer
            for layer in self.cache.layers
        ]
        self.trunk = trunk_of(model) if has_plain_head(model) else model
        accepted = inspect.signature(self.trunk.forward).parameters
        self.takes_positions = "position_ids" in accepted  # models with ALiBi take none
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"  # the name up to transformers 5.2
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def prefill(self) -> torch.Tensor:
        """[rows, d] last hidden states of the prompts (or logits, see _next_tokens)."""
        ids = torch.zeros(len(self.unique), self.width, dtype=torch.long)
        for line, prompt in enumerate(self.unique):
            ids[line, self.width - len(prompt) :] = torch.tensor(prompt)
            self.mask[line, : self.width - len(prompt)] = 0
        positions = (self.mask[:, : self.width].cumsum(-1) - 1).clamp(min=0)
        states = self._forward(ids.to(self.device), positions)[self.source]
        self.positions = positions[self.source, -1:]
        self._select(self.source)
        return states

    def step(self, tokens: list[int], active: set[int]) -> torch.Tensor:
        """[rows, d] states (or logits) after one more token in each row; inactive rows may leave the batch first."""
        if len(active) <= (1 - _COMPACT_AT) * len(self.rows):
            keep = [n for n, row in enumerate(self.rows) if row in active]
            tokens, self.rows = [tokens[n] for n in keep], [self.rows[n] for n in keep]
            places = torch.tensor(keep, device=self.device)
            self.positions = self.positions[places]
            self._select(places)
        self.positions = self.positions + 1
        if self.context:  # ended rows that are still in the batch may pass the end; their output is not read
            self.positions.clamp_(max=self.context - 1)
        return self._forward(torch.tensor(tokens, device=self.device)[:, None], self.positions)

    def _select(self, places: torch.Tensor) -> None:
        self.mask = self.mask[places]
        self.cache.batch_select_indices(places)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        length = self.cache.get_seq_length() + ids.shape[1]
        where = {"position_ids": positions} if self.takes_positions else {}
        output = self.trunk(
            input_ids=ids,
            attention_mask=self.mask[:, :length],
            use_cache=True,
            **{self.cache_name: self.cache},
            **where,
            **self.extra,
        )
        return (output.logits if self.trunk is self.model else output.last_hidden_state)[:, -1]


class _PreallocatedLayer(DynamicLayer):
    """A cache layer that allocates `capacity` positions at once; `DynamicLayer` copies itself at every step."""

    is_initialized: bool

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [rows, heads, new, width]; returns the keys and values of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [self._buffer_like(states) for states in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`, in that order."""
        kept, self.is_initialized = (self.keys[indices], self.values[indices]), False
        del self.keys, self.values, self.buffers  # frees their memory before the new buffers are allocated
        self.update(*kept)

    def _buffer_like(self, states: torch.Tensor) -> torch.Tensor:
        rows, heads, _, width = states.shape
        return states.new_empty(rows, heads, self.capacity, width)


def _limits(model: PreTrainedModel, prompts: list[list[int]], prompt_keys: list[str], max_new_tokens: int) -> list[int]:
    """The most new tokens of each prompt. Raises InputError for an empty prompt and one that fills the context."""
    context = context_length(model)
    limits = []
    for prompt, key in zip(prompts, prompt_keys, strict=True):
        if not prompt:
            raise InputError(
                f"prompt {key}: it has no tokens", "a model needs at least one token to continue (a BOS is enough)"
            )
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
        if room < 1:
            raise InputError(
                f"prompt {key}: its {len(prompt)} tokens leave no room in the model's context of {context}",
                hint="shorten the prompt",
            )
        limits.append(room)
    return limits


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends a text: the tokenizer's EOS and those of the model's generation configuration."""
    ids = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _tail_length(stop: tuple[str, ...]) -> int:
    """How many last tokens to search for a stop string; 0 without one.

    A token holds at least one byte; the margin covers bytes of the first tokens that precede the string.
    """
    return max((len(s.encode()) for s in stop), default=-8) + 8


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found, default=None)


def _completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int], finish: str, stop: tuple[str, ...]
) -> Completion:
    """Token ids to text, cut before the first stop string, with the longest run of ids that fits into that text."""
    text = _text_after(tokenizer, prompt, ids)
    cut = _first_stop(text, stop)
    if cut is not None:
        text = text[:cut]
        while ids and len(_text_after(tokenizer, prompt, ids)) > cut:
            ids = ids[:-1]
    return Completion(ids, text, finish)


def _text_after(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int]) -> str:
    """The text that `ids` add to the prompt. Decoded alone, some tokenizers would drop a leading space."""
    before, joined = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return joined[len(before) :] if joined.startswith(before) else tokenizer.decode(ids)
