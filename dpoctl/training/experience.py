"""What a PPO step collects: episodes, and per response token the quantities that it learns from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Episodes:
    """A step's prompts and responses: rows of text and ids; `sequences` (ids, start) include the EOS."""

    rows: list[dict[str, Any]]
    sequences: list[tuple[list[int], int]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response, the EOS counted."""
        return [len(ids) - start for ids, start in self.sequences]


@dataclass
class Experience:
    """What a step learns from, per response token [B, T]; 0 after a response's end."""

    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def mask_of(lengths: list[int]) -> Tensor:
    """True [B, T] on the tokens of responses of these lengths."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def scatter(target: Tensor, rows: list[int], mask: Tensor, flat: Tensor) -> None:
    """Write the per-token values [N] float32 of some rows, on the CPU, into `target` [B, T]."""
    part = torch.zeros(len(rows), mask.shape[1])
    part[mask[rows]] = flat
    target[rows] = part
