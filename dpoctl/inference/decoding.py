"""Rows of text that grow by a token a step, with the caches of a model's attention and recurrent layers.

Each prompt is run once, its cache is copied to its completions, and rows that have ended leave the batch. How rows may
share a batch depends on the architecture (`Mode`), and is found out by trying: what a batch of cached rows gives is
compared with a forward pass of each text alone. Recurrent states see padding unless the model masks it; then only
prompts of equal length share a batch.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .. import log
from ..models import rope
from ..models.load import context_length
from ..models.precision import full_precision
from ..models.probes import agree, has_plain_head, probe_ids, probe_length, trunk_of
from ..runtime.devices import to_device
from ..runtime.sharing import forward_in_step
from . import captured
from .key_cache import KeyCache, PreallocatedLayer, select_rows

_COMPACT_AT = 0.25  # fraction of ended rows in the batch at which they are removed from it
_COMPACT_CAPTURED_AT = 0.5  # where each removal takes a new capture
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # in transformers' order of time, newest first
_PREFILL_TOKENS = 16384  # of all prompts together in one forward pass
_NEW_TOKENS = 4  # of each row of a probe


class Mode(Enum):
    """How rows of different prompts share a batch, fastest first."""

    CAPTURED = "prompts are padded on the left, under a mask, and a step is one CUDA graph"
    PADDED = "prompts are padded on the left, under a mask"
    PADDED_PROMPT = "prompts are padded on the left; only the prompt's pass is masked, the layers being recurrent"
    ALIGNED = "prompts of equal length share a batch"
    UNCACHED = "prompts of equal length share a batch, and every step runs their whole texts"


class Decoding:
    """The rows that are being decoded, in one batch or several that advance together.

    `rows` are the numbers of the rows whose states the last call returned, in that order.
    """

    def __init__(self, batches: Sequence["_Batch"]):
        self.batches = list(batches)

    @property
    def rows(self) -> list[int]:
        """The numbers of the rows in the batch."""
        return [row for batch in self.batches for row in batch.rows]

    def prefill(self) -> Tensor:
        """[rows, d] last hidden states of the prompts (or logits, where the head is not plain)."""
        return torch.cat([batch.prefill() for batch in self.batches])

    def step(self, tokens: list[int], active: set[int]) -> Tensor:
        """[rows, d] states (or logits) after one more token in each row; inactive rows may leave the batch first."""
        left, states = iter(tokens), []
        given = [[next(left) for _ in batch.rows] for batch in self.batches]
        kept = []
        for batch, new in zip(self.batches, given, strict=True):
            if active.intersection(batch.rows):
                states.append(batch.step(new, active))
                kept.append(batch)
        self.batches = kept
        return torch.cat(states)


def open_decoding(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of: list[int], steps: int
) -> Decoding:
    """Rows of which number n continues `prompts[prompt_of[n]]` by at most `steps` tokens, in the model's mode."""
    longest = max(map(len, prompts)) + steps - 1  # the last token is not forwarded
    mode = mode_of(model, longest)
    if mode is Mode.CAPTURED and steps < captured.WORTH:
        mode = Mode.PADDED
    switch = rope.switch_of(model)
    if switch and longest > switch.length:
        _say_crossing(model, switch.length)
        at_most = Mode.UNCACHED if switch.gradual else Mode.ALIGNED
        mode = max(mode, at_most, key=list(Mode).index)
    return Decoding(_batches(model, mode, [list(prompts[i]) for i in prompt_of], steps))


def forward_shortest(model: PreTrainedModel) -> None:
    """A forward pass of one token, with which a rank accompanies those of other ranks (see `sharing.in_step`)."""
    trunk = trunk_of(model) if has_plain_head(model) else model
    with torch.no_grad():
        trunk(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _batches(model: PreTrainedModel, mode: Mode, texts: list[list[int]], steps: int) -> list["_Batch"]:
    if mode in (Mode.CAPTURED, Mode.PADDED, Mode.PADDED_PROMPT):
        return [_PaddedBatch(model, texts, list(range(len(texts))), steps, mode)]
    by_length: dict[int, list[int]] = {}
    for row, text in enumerate(texts):
        by_length.setdefault(len(text), []).append(row)
    kind = _AlignedBatch if mode is Mode.ALIGNED else _UncachedBatch
    return [kind(model, [texts[row] for row in rows], rows) for rows in by_length.values()]


def _say_crossing(model: PreTrainedModel, length: int) -> None:
    if not getattr(model, "_dpoctl_said_crossing", False):
        model._dpoctl_said_crossing = True
        log.warn(
            f"completions may pass {length} tokens, where the model's rotary frequencies change: the tokens before are "
            "sampled with those of short texts, but log-probs of the whole text are taken with those of long texts"
        )


class _Batch(ABC):
    """Rows that are forwarded together. `rows`: their numbers; each distinct prompt is run once."""

    def __init__(self, model: PreTrainedModel, texts: list[list[int]], rows: list[int]):
        self.model, self.device = model, model.device
        self.rows = rows
        self.unique = [list(ids) for ids in dict.fromkeys(map(tuple, texts))]
        place = {tuple(ids): n for n, ids in enumerate(self.unique)}
        # for each row, the line of the prefill that it copies
        self.source = torch.tensor([place[tuple(text)] for text in texts], device=self.device)
        self.trunk = trunk_of(model) if has_plain_head(model) else model
        accepted = inspect.signature(self.trunk.forward).parameters
        self.takes_positions = "position_ids" in accepted  # models with ALiBi take none
        self.cache_name = next((name for name in _CACHE_NAMES if name in accepted), "")
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.compact_at = _COMPACT_AT

    @abstractmethod
    def prefill(self) -> Tensor:
        """[rows, d] states after the prompts."""

    def step(self, tokens: list[int], active: set[int]) -> Tensor:
        """[rows, d] states after one more token in each row, once enough of the inactive rows have been removed."""
        if len(active.intersection(self.rows)) <= (1 - self.compact_at) * len(self.rows):
            keep = [n for n, row in enumerate(self.rows) if row in active]
            tokens, self.rows = [tokens[n] for n in keep], [self.rows[n] for n in keep]
            self.select(to_device(torch.tensor(keep), self.device))
        return self.advance(to_device(torch.tensor(tokens), self.device)[:, None])

    @abstractmethod
    def select(self, places: Tensor) -> None:
        """Keep the rows at `places`, in that order."""

    @abstractmethod
    def advance(self, tokens: Tensor) -> Tensor:
        """[rows, d] states after `tokens` [rows, 1]."""

    def output(self, ids: Tensor, **arguments: Any) -> Any:
        """The model's output for `ids` [rows, new]."""
        return forward_in_step(self.model, partial(self.trunk, input_ids=ids, **arguments, **self.extra))

    def last(self, output: Any) -> Tensor:
        """[rows, d] states (or logits) at the last position."""
        return (output.logits if self.trunk is self.model else output.last_hidden_state)[:, -1]


class _PaddedBatch(_Batch):
    """Prompts of any lengths, padded on the left."""

    def __init__(
        self, model: PreTrainedModel, texts: list[list[int]], rows: list[int], steps: int, mode: Mode = Mode.PADDED
    ):
        super().__init__(model, texts, rows)
        self.masks_steps, self.prefill_tokens = mode is not Mode.PADDED_PROMPT, _PREFILL_TOKENS
        self.context = context_length(model)
        self.width = max(map(len, self.unique))
        self.length = 0
        self.mask = torch.ones(len(self.unique), self.width + steps, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(len(rows), 1, dtype=torch.long, device=self.device)
        self.cache = KeyCache(config=model.config)
        self.cache.layers = [  # other kinds of layer, such as sliding windows, are kept
            PreallocatedLayer(self.width + steps) if type(layer) is DynamicLayer else layer
            for layer in self.cache.layers
        ]
        self.captures = mode is Mode.CAPTURED
        if self.captures:
            if not (self.takes_positions and captured.can_capture(self.cache.layers, self.device)):
                raise TypeError("positions or a kind of cache that a graph of one step needs are missing")
            self.compact_at = _COMPACT_CAPTURED_AT
        self.captured: captured.CapturedStep | None = None

    def prefill(self) -> Tensor:
        ids = torch.zeros(len(self.unique), self.width, dtype=torch.long)
        for line, prompt in enumerate(self.unique):
            ids[line, self.width - len(prompt) :] = torch.tensor(prompt)
            self.mask[line, : self.width - len(prompt)] = 0
        positions = (self.mask[:, : self.width].cumsum(-1) - 1).clamp(min=0)
        ids, each = ids.to(self.device), self._columns_at_once()
        for start in range(0, self.width, each):
            part = slice(start, start + each)
            states = self._forward(ids[:, part], positions[:, part], masked=True)
        self.positions = positions[:, -1:]
        self.select(self.source)
        return states[self.source]

    def _columns_at_once(self) -> int:
        """How many tokens of each prompt are forwarded together: all, or fewer where the cache is of attention alone.

        Long prompts of a large batch would take more memory for their activations than for their keys and values.
        """
        only_attention = all(type(each) in (PreallocatedLayer, DynamicSlidingWindowLayer) for each in self.cache.layers)
        return max(1, self.prefill_tokens // len(self.unique)) if only_attention else self.width

    def advance(self, tokens: Tensor) -> Tensor:
        self.positions = self.positions + 1
        if self.context:  # ended rows that are still in the batch may pass the end; their output is not read
            self.positions.clamp_(max=self.context - 1)
        if not self.captures:
            return self._forward(tokens, self.positions, masked=self.masks_steps)
        if self.captured is None:
            self.captured = captured.CapturedStep(self._masked_step, self.cache.layers, self.mask, self.length)
        self.length += 1
        return self.captured.run(tokens, self.positions)

    def _masked_step(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        known = {self.cache_name: self.cache, "position_ids": positions, "attention_mask": mask}
        return self.last(self.output(tokens, use_cache=True, **known))

    def select(self, places: Tensor) -> None:
        if self.captured:
            self.captured.release()
            self.captured = None
        self.positions, self.mask = self.positions[places], self.mask[places]
        select_rows(self.cache, places)

    def _forward(self, ids: Tensor, positions: Tensor, *, masked: bool) -> Tensor:
        self.length += ids.shape[1]
        arguments = {"position_ids": positions} if self.takes_positions else {}
        if masked:
            arguments["attention_mask"] = self.mask[:, : self.length]
        return self.last(self.output(ids, use_cache=True, **{self.cache_name: self.cache}, **arguments))


class _AlignedBatch(_Batch):
    """Prompts of one length, with the cache that the model makes itself, and neither padding nor mask."""

    def __init__(self, model: PreTrainedModel, texts: list[list[int]], rows: list[int]):
        super().__init__(model, texts, rows)
        self.texts = torch.tensor(self.unique, device=self.device)
        self.cache: Any = None
        self.switch = rope.switch_of(model)

    def prefill(self) -> Tensor:
        states = self._forward(self.texts)[self.source]
        self.select(self.source)
        return states

    def advance(self, tokens: Tensor) -> Tensor:
        self.texts = torch.cat([self.texts, tokens], dim=1)
        if self.switch and self.texts.shape[1] == self.switch.length + 1:  # cached keys have other frequencies
            self.cache = None
            return self._forward(self.texts)
        return self._forward(tokens)

    def select(self, places: Tensor) -> None:
        self.texts = self.texts[places]
        select_rows(self.cache, places)

    def _forward(self, ids: Tensor) -> Tensor:
        known = {} if self.cache is None else {self.cache_name: self.cache}
        if self.takes_positions:
            end = self.texts.shape[1]
            places = torch.arange(end - ids.shape[1], end, device=self.device)
            known["position_ids"] = places.expand(len(ids), -1)
        output = self.output(ids, use_cache=True, **known)
        self.cache = getattr(output, self.cache_name)  # AttributeError: the model keeps its states elsewhere
        return self.last(output)


class _UncachedBatch(_Batch):
    """Prompts of one length, whose whole texts are run at every step: for models without a cache that can be used."""

    def __init__(self, model: PreTrainedModel, texts: list[list[int]], rows: list[int]):
        super().__init__(model, texts, rows)
        self.texts = torch.tensor(self.unique, device=self.device)

    def prefill(self) -> Tensor:
        states = self._forward()[self.source]
        self.select(self.source)
        return states

    def advance(self, tokens: Tensor) -> Tensor:
        self.texts = torch.cat([self.texts, tokens], dim=1)
        return self._forward()

    def select(self, places: Tensor) -> None:
        self.texts = self.texts[places]

    def _forward(self) -> Tensor:
        rope.reset(self.model)
        return self.last(self.output(self.texts, use_cache=False))


# --- which mode ------------------------------------------------------------------------------------------------------


def mode_of(model: PreTrainedModel, longest: int) -> Mode:
    """The fastest mode that is right for texts of up to `longest` tokens; tried once for each length of the probe."""
    if assumed := model.__dict__.get("_dpoctl_mode"):
        return assumed
    if not hasattr(model, "_dpoctl_modes"):
        model._dpoctl_modes = {}
    known: dict[int, Mode] = model._dpoctl_modes
    length = probe_length(model, longest)
    if length not in known:
        known[length] = _find_mode(model, length)
        if known[length] not in (Mode.CAPTURED, Mode.PADDED):
            log.say(f"{type(model).__name__}: {known[length].value}")
    return known[length]


def assume_mode(model: PreTrainedModel, mode: Mode) -> None:
    """Decode in this mode a model that cannot be tried: its weights are sharded, or have no numbers."""
    model._dpoctl_mode = mode


@torch.inference_mode()
def _find_mode(model: PreTrainedModel, length: int) -> Mode:
    # One text is longer than any window, one passes it while it grows, and one is short; the first has two rows.
    sizes = (length - _NEW_TOKENS, max(1, length - 2 * _NEW_TOKENS), 2)
    prompts = [probe_ids(model, size, seed) for seed, size in enumerate(sizes)]
    prompt_of = [1, 0, 2, 0]
    new = [probe_ids(model, _NEW_TOKENS, 10 + row) for row in range(len(prompt_of))]
    with full_precision(model, model.device):
        texts = [prompts[i] + tokens for i, tokens in zip(prompt_of, new, strict=True)]
        expected = [_alone(model, text) for text in texts]
        for mode in (Mode.CAPTURED, Mode.PADDED, Mode.PADDED_PROMPT, Mode.ALIGNED):
            try:
                decoding = Decoding(_batches(model, mode, [prompts[i] for i in prompt_of], _NEW_TOKENS))
                for batch in decoding.batches:
                    if isinstance(batch, _PaddedBatch):  # two parts, as large batches have several
                        batch.prefill_tokens = len(batch.unique) * -(-batch.width // 2)
                if _is_right(decoding, [len(prompts[i]) for i in prompt_of], new, expected):
                    return mode
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as e:
                log.detail(f"{type(model).__name__}: not so that {mode.value}: {type(e).__name__}: {e}")
    return Mode.UNCACHED


def _alone(model: PreTrainedModel, text: list[int]) -> Tensor:
    """[tokens, d] states (or logits) of one text without a cache."""
    trunk = trunk_of(model) if has_plain_head(model) else model
    output = trunk(input_ids=torch.tensor([text], device=model.device), use_cache=False)
    return (output.logits if trunk is model else output.last_hidden_state)[0]


def _is_right(decoding: Decoding, starts: list[int], new: list[list[int]], expected: list[Tensor]) -> bool:
    """Whether decoding gives the states of each row's text alone, while its last rows leave one by one."""
    states = decoding.prefill()
    for step in range(_NEW_TOKENS):
        for state, row in zip(states, decoding.rows, strict=True):
            if not agree(state, expected[row][starts[row] + step - 1]):
                return False
        active = set(range(max(1, len(starts) - step)))
        if step < _NEW_TOKENS - 1:
            states = decoding.step([new[row][step] for row in decoding.rows], active)
    return True
