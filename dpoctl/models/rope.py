"""Rotary positions whose frequencies depend on the text's length: longrope, and dynamic NTK scaling.

transformers picks the frequencies of a forward pass by the longest text in it. A log-prob must not depend on what
shares its batch, so texts of different frequencies are forwarded apart (`groups`), and what an earlier, longer text
left behind is removed first (`reset`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Switch:
    """Texts of more than `length` tokens have other frequencies; `gradual`: another set for every longer length."""

    length: int
    gradual: bool

    def key(self, length: int) -> Hashable:
        """Texts of equal keys have the same frequencies."""
        return 0 if length <= self.length else length if self.gradual else self.length + 1


def switch_of(model: Any) -> Switch | None:
    """Where the frequencies of a model change with the length of the text; None where they do not."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    if not isinstance(parameters, dict):
        return None
    every = [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]  # some have one set a layer type
    for each in every:
        kind = each.get("rope_type")
        original = each.get("original_max_position_embeddings")
        if kind == "longrope":
            return Switch(original or config.max_position_embeddings, gradual=False)
        if kind == "dynamic":
            return Switch(config.max_position_embeddings, gradual=True)
    return None


def groups(models: Sequence[Any], lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts with `lengths` tokens, in groups of the same frequencies in all `models`, short ones first."""
    switches = [switch for switch in map(switch_of, models) if switch]
    if not switches:
        return [list(range(len(lengths)))]
    found: dict[tuple[Hashable, ...], list[int]] = {}
    for i, length in enumerate(lengths):
        found.setdefault(tuple(switch.key(length) for switch in switches), []).append(i)
    return [found[key] for key in sorted(found)]


def reset(model: nn.Module) -> None:
    """Restore the frequencies of short texts, which dynamic scaling keeps too long once a longer text has passed."""
    for module in model.modules():
        original = getattr(module, "original_max_seq_len", None)
        if original is not None and getattr(module, "max_seq_len_cached", original) != original:
            rotary: Any = module
            rotary.max_seq_len_cached = original
            rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)
