"""A decoding step as a CUDA graph: its kernels are launched together, in place of hundreds of launches from Python.

A graph repeats the same kernels on the same addresses. What changes between steps is therefore held in tensors: the
tokens, their positions, the place of the cache that is written, and a mask over the whole cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .key_cache import PreallocatedLayer

WORTH = 16  # steps from which a capture, which takes as long as a few of them, is worth it


def capture(step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
    """(the result of running `step` now, a function that repeats it and returns the result in the same memory)."""
    stream = torch.cuda.Stream()  # a graph's libraries must have been initialised on a stream that is not the default
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog, a thread, asks for its events
        result = step()

    def repeat() -> Tensor:
        graph.replay()
        return result

    return first, repeat


class CapturedStep:
    """The steps of the same rows after one of them, captured when it first runs.

    `forward(tokens, mask, positions)` gives the states [rows, d] after `tokens` [rows, 1] at `positions` [rows, 1],
    where `mask` [rows, 1, 1, capacity] is true for what each row sees of the caches. `seen` [rows, capacity] is 0 for
    padding, 1 for everything else, and `length` the number of positions that the caches hold.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        layers: Sequence[Any],
        seen: Tensor,
        length: int,
    ):
        self.forward, self.layers, self.length = forward, [each for each in layers if each.is_initialized], length
        self.mask = seen.bool()[:, None, None]
        self.mask[..., length:] = False
        self.tokens, self.positions = torch.zeros(2, len(seen), 1, dtype=torch.long, device=seen.device)
        self.at = torch.zeros(1, dtype=torch.long, device=seen.device)
        self.repeat: Callable[[], Tensor] | None = None
        for layer in self.layers:
            layer.write_at(self.at)

    def run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """States [rows, d] after one more token in each row, which the next call overwrites."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.at.fill_(self.length)
        self.mask[..., self.length] = True
        self.length += 1
        if self.repeat is None:
            states, self.repeat = capture(self._step)
            return states
        return self.repeat()

    def release(self) -> None:
        """Let the caches grow step by step again."""
        self.repeat = None
        for layer in self.layers:
            layer.grow_from(self.length)

    def _step(self) -> Tensor:
        device = self.tokens.device.type
        # weights that autocast casts and keeps would be in the graph's memory, which others may overwrite
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            return self.forward(self.tokens, self.mask, self.positions)


def can_capture(layers: Sequence[Any], device: torch.device) -> bool:
    """Whether a step with a cache of these layers can be one graph."""
    return device.type == "cuda" and all(type(layer) is PreallocatedLayer for layer in layers)
