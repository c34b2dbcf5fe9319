"""The keys and values that decoding keeps: in the compute dtype, in memory that is allocated once."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


def select_rows(cache: Any, places: Tensor) -> None:
    """Keep the rows of a cache at `places`: by a method of the cache's own, else as beam search does."""
    own = getattr(type(cache), "batch_select_indices", None)
    if own is None or own is Cache.batch_select_indices:  # which not every kind of layer has
        cache.reorder_cache(places)
    else:
        cache.batch_select_indices(places)


class KeyCache(DynamicCache):
    """A cache that holds keys in the values' dtype under autocast, in which attention reads them.

    Rotary positions leave keys in float32, beside values in the compute dtype.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(key_states.device.type):
            key_states = key_states.to(value_states.dtype)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class PreallocatedLayer(DynamicLayer):
    """A cache layer that allocates `capacity` positions at once; `DynamicLayer` copies itself at every step."""

    is_initialized: bool

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.at: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states [rows, heads, new, width]; returns the keys and values of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [self._buffer_like(states) for states in (key_states, value_states)]
        if self.at is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.at, states.to(buffer.dtype))
            return self.buffers[0], self.buffers[1]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def write_at(self, at: Tensor) -> None:
        """From now on write each token's states at position `at` [1], and give the buffers whole, to be masked."""
        self.at = at
        for buffer in self.buffers:
            buffer[:, :, self.get_seq_length() :] = 0  # what a mask hides must be finite

    def grow_from(self, length: int) -> None:
        """Append again, to the first `length` positions."""
        self.at = None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at `beam_idx`, in that order."""
        if not self.is_initialized:  # a layer that another layer's cache serves
            return
        kept, self.is_initialized = (self.keys[beam_idx], self.values[beam_idx]), False
        del self.keys, self.values, self.buffers  # frees their memory before the new buffers are allocated
        self.update(*kept)

    def _buffer_like(self, states: Tensor) -> Tensor:
        rows, heads, _, width = states.shape
        return states.new_empty(rows, heads, self.capacity, width)
