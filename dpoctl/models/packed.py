"""A micro-batch as one row without padding, in which the completions of a prompt share it: a forest of trees.

    sequences   p0 p1 a0 a1 | p0 p1 b0 | q0 c0 c1           (two completions of p, one of q)
    packed      p0 p1 a0 a1 b0 q0 c0 c1
    position     0  1  2  3  2  0  1  2
    branch       0  0  1  1  2  0  0  0                     (0: trunk, seen by all branches of its group)

A token attends to the tokens of its group at its position or before, on the trunk or on the same branch. transformers
accepts a custom attention function for every architecture (`AttentionInterface`). Positions are passed as
`position_ids` and the tree as a keyword argument, so no model code is replaced. Without a tree the function is
transformers' SDPA attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..runtime.devices import to_device

NAME = "dpoctl_tree"
_FLEX_BLOCK = 128  # FlexAttention's block size: rows are filled up to a multiple of it
_FEWEST_ROWS = 2 * _FLEX_BLOCK  # a row of one block would be a variant of its own of the compiled attention
# Variants of the compiled attention in a process: models (policy, reference, value, reward, scorer, several in
# `evaluate`) x windows x with and without gradient x dtypes. torch's own limit of 8 is reached by one model with two
# windows and one scorer; beyond the limit a call raises, since it is compiled with `fullgraph`.
_VARIANTS = 128
# What may be passed to attention without changing its numbers here; any other argument may, such as a soft cap.
_NEUTRAL = (
    *("dropout", "is_causal", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
)


@dataclass(frozen=True)
class Call:
    """What attention is called with, apart from the tokens: query and key heads, width of keys and of values."""

    heads: int
    key_heads: int
    width: int
    value_width: int
    window: int | None
    scale: float | None
    dtype: torch.dtype


@dataclass
class Tree:
    """Which token attends to which in a packed row: group, branch and position [N] of its tokens, group after group.

    `calls` is None, or collects the calls of a probe, which attends by masks on any device.
    """

    group: Tensor
    branch: Tensor
    position: Tensor
    sizes: list[int]  # tokens of each group
    linear: list[bool]  # groups without branches, for which causal attention is exact
    longest: int
    cache: dict[Any, Any] = field(default_factory=dict)  # masks, built at first use, shared by all layers
    filler: int = 0  # tokens at the end that fill the last block
    calls: set[Call] | None = None

    def visible(self, q: Tensor, k: Tensor, window: int | None) -> Tensor:
        """Whether the tokens at `q` attend to those at `k`: index tensors that broadcast against each other."""
        seen = (self.group[q] == self.group[k]) & (self.position[k] <= self.position[q])
        seen = seen & ((self.branch[k] == 0) | (self.branch[k] == self.branch[q]))
        return seen if window is None else seen & (self.position[q] - self.position[k] < window)

    def masks(self, window: int | None) -> list[Tensor | None]:
        """A mask [n, n] for each group, None where causal attention is enough."""
        window = self._effective(window)
        if window not in self.cache:
            masks: list[Tensor | None] = []
            start = 0
            for size, linear in zip(self.sizes, self.linear, strict=True):
                at = torch.arange(start, start + size, device=self.group.device)
                masks.append(None if linear and window is None else self.visible(at[:, None], at[None], window))
                start += size
            self.cache[window] = masks
        return self.cache[window]

    def block_mask(self, window: int | None) -> Any:
        """The masks of all groups as one FlexAttention BlockMask [N, N]."""
        window = self._effective(window)
        key = ("flex", window)
        if key not in self.cache:
            from torch.nn.attention.flex_attention import create_block_mask

            n = len(self.group)
            self.cache[key] = create_block_mask(
                lambda b, h, q, k: self.visible(q, k, window), None, None, n, n, self.group.device
            )
        return self.cache[key]

    def _effective(self, window: int | None) -> int | None:
        """None for a window that hides nothing, so that layers with and without one share masks and kernels."""
        return None if window is not None and window >= self.longest else window


def uses_flex(device: torch.device) -> bool:
    """Whether packed rows are attended to with FlexAttention, whose rows are filled up to whole blocks."""
    return device.type == "cuda"


def pack(
    sequences: Sequence[tuple[Sequence[int], int]], width: int, device: torch.device, *, whole: bool
) -> tuple[Tensor, Tree, Tensor, Tensor]:
    """(ids [1, T], its tree, at [N], ends [B]) of sequences `(ids, start)`; see `logprobs.Layout` for at and ends.

    Without `whole` the last token of each sequence, which predicts nothing, is left out, and `ends` is one before it.
    """
    ids: list[int] = []
    group: list[int] = []
    branch: list[int] = []
    position: list[int] = []
    sizes: list[int] = []
    at: list[list[int]] = [[] for _ in sequences]
    ends = [0] * len(sequences)
    groups = group_by_prompt(sequences, width)
    for g, members in enumerate(groups):
        base, start = len(ids), sequences[members[0]][1]
        ids.extend(sequences[members[0]][0][:start])
        branch.extend([0] * start)
        position.extend(range(start))
        for b, i in enumerate(members, start=len(members) > 1):
            first, text = len(ids), sequences[i][0]
            tail = text[start:] if whole else text[start:-1]
            ids.extend(tail)
            branch.extend([b] * len(tail))
            position.extend(range(start, start + len(tail)))
            at[i] = [base + start - 1, *range(first, first + len(text) - start - 1)][: len(text) - start]
            ends[i] = len(ids) - 1 if tail else base + start - 1
        sizes.append(len(ids) - base)
        group.extend([g] * sizes[-1])
    room = max(_FEWEST_ROWS - len(ids), -len(ids) % _FLEX_BLOCK) if uses_flex(device) else 0
    if room:
        # a group of its own, at a position that every model has
        for each, filler in ((ids, 0), (branch, 0), (position, 0), (group, len(groups))):
            each.extend([filler] * room)
        sizes.append(room)
    # int32, since FlexAttention's kernels load them for each pair of blocks
    of_group, of_branch, at_position = (
        to_device(torch.tensor(x, dtype=torch.int32), device) for x in (group, branch, position)
    )
    linear = [len(members) == 1 for members in groups] + [True] * (len(sizes) - len(groups))
    tree = Tree(of_group, of_branch, at_position, sizes, linear, max(position) + 1, filler=room)
    places = torch.tensor([row for rows in at for row in rows], dtype=torch.long)
    return torch.tensor([ids]), tree, places, torch.tensor(ends)


def token_counts(sequences: Sequence[tuple[Sequence[int], int]], width: int, counts: Sequence[float]) -> list[float]:
    """How often each token of the `whole` packed row counts, where sequence i counts `counts[i]` times."""
    found: list[float] = []
    for members in group_by_prompt(sequences, width):
        start = sequences[members[0]][1]
        found.extend([sum(counts[i] for i in members)] * start)
        for i in members:
            found.extend([counts[i]] * (len(sequences[i][0]) - start))
    return found


def pad(sequences: Sequence[tuple[Sequence[int], int]], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], at [N], ends [B]) of sequences padded on the right with the id `padding`."""
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([list(s) + [padding] * (width - len(s)) for s, _ in sequences])
    at = torch.cat([torch.arange(start - 1, len(s) - 1) + b * width for b, (s, start) in enumerate(sequences)])
    ends = torch.tensor([b * width + len(s) - 1 for b, (s, _) in enumerate(sequences)])
    return ids, at, ends


def arguments(tree: Tree) -> dict[str, Any]:
    """The arguments of a model's forward beside the packed ids."""
    # A four-dimensional mask is passed through; without one, transformers would build [T, T] from the positions.
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=tree.position.device)
    return {"position_ids": tree.position[None].long(), "attention_mask": mask, "tree": tree}


def group_by_prompt(sequences: Sequence[tuple[Sequence[int], int]], width: int) -> list[list[int]]:
    """Indices of sequences in groups that share a prompt, where sharing saves more than the wider masks cost.

    Sharing saves k - 1 copies of the prompt, about 24 `width`^2 operations per token and layer, and costs attention
    between branches, 4 `width` per pair of tokens. `width` is the model's hidden size.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, start) in enumerate(sequences):
        same.setdefault(tuple(ids[:start]), []).append(i)
    groups = []
    for prompt, members in same.items():
        tails = [len(sequences[i][0]) - len(prompt) for i in members]
        shared = (len(prompt) + sum(tails)) ** 2
        separate = sum((len(prompt) + tail) ** 2 for tail in tails)
        if (len(members) - 1) * len(prompt) * 6 * width >= shared - separate:
            groups.append(members)
        else:
            groups.extend([i] for i in members)
    return groups


def attend(  # the signature is transformers' attention interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention by the tree: query, key and value [1, heads, N, d] in, ([1, N, heads, d], None) out.

    Raises ValueError for an option of the architecture that changes the numbers and is not supported.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling, window = options.get("scaling"), options.get("sliding_window")
    known = ("scaling", "sliding_window", *_NEUTRAL)
    if unknown := [name for name, option in options.items() if name not in known and option is not None]:
        raise ValueError(f"attention with {unknown[0]}")
    # Under autocast rotary positions leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if tree.calls is None and uses_flex(query.device):
        return attend_by_blocks(query, key, value, tree, window, scaling), None
    if tree.calls is not None:
        heads, widths = (query.shape[1], key.shape[1]), (key.shape[-1], value.shape[-1])
        tree.calls.add(Call(*heads, *widths, window, scaling, value.dtype))
    return attend_by_masks(query, key, value, tree, window, scaling), None


def attend_by_masks(  # the parts of `attend`
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, scale: float | None
) -> Tensor:
    """[1, N, heads, d]: torch's attention, group by group under its mask."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    parts = zip(*(x.split(tree.sizes, dim=2) for x in (query, key, value)), tree.masks(window), strict=True)
    outs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)
        for q, k, v, mask in parts
    ]
    return torch.cat(outs, dim=1)


def attend_by_blocks(  # the parts of `attend`
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, scale: float | None
) -> Tensor:
    """[1, N, heads, d]: FlexAttention over the whole row, compiled; N is a multiple of its block size."""
    grouped = query.shape[1] > key.shape[1]
    out = compiled_flex()(query, key, value, tree.block_mask(window), scale, grouped)
    return out.transpose(1, 2).contiguous()


@cache
def compiled_flex(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """FlexAttention, compiled for rows of any length.

    With `fullgraph` what cannot be compiled raises. Otherwise torch would run it without a kernel, with a warning, and
    hold the scores of all pairs of tokens.
    """
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 2 * _VARIANTS)
    return torch.compile(_flex, dynamic=True, fullgraph=True, backend=backend)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None, grouped: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Rows are filled to whole blocks: said here, it spares the kernel its checks of the row's end. The kernel option
    # ROWS_GUARANTEED_SAFE would be wrong: a token sees itself, but nothing in the blocks of other groups.
    torch._check(query.shape[2] % _FLEX_BLOCK == 0)
    torch._check(key.shape[2] % _FLEX_BLOCK == 0)
    return flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
