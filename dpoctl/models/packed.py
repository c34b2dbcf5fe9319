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
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "dpoctl_tree"
_FLEX_BLOCK = 128  # FlexAttention's block size: rows are filled up to a multiple of it
# What may be passed to attention without changing its numbers here; any other argument may, such as a soft cap.
_NEUTRAL = (
    *("dropout", "is_causal", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
)


@dataclass
class Tree:
    """Which token attends to which in a packed row: group, branch and position [N] of its tokens, group after group."""

    group: Tensor
    branch: Tensor
    position: Tensor
    sizes: list[int]  # tokens of each group
    linear: list[bool]  # groups without branches, for which causal attention is exact
    longest: int
    cache: dict[Any, Any] = field(default_factory=dict)  # masks, built at first use, shared by all layers

    def visible(self, q: Tensor, k: Tensor, window: int | None) -> Tensor:
        """Whether the tokens at `q` attend to those at `k`: index tensors that broadcast against each other."""
        seen = (self.group[q] == self.group[k]) & (self.position[k] <= self.position[q])
        seen = seen & ((self.branch[k] == 0) | (self.branch[k] == self.branch[q]))
        return seen if window is None else seen & (self.position[q] - self.position[k] < window)

    def masks(self, window: int | None) -> list[Tensor | None]:
        """A mask [n, n] for each group, None where causal attention is enough."""
        if window is not None and window >= self.longest:
            window = None
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
        key = ("flex", window)
        if key not in self.cache:
            from torch.nn.attention.flex_attention import create_block_mask

            n = len(self.group)
            self.cache[key] = create_block_mask(
                lambda b, h, q, k: self.visible(q, k, window), None, None, n, n, self.group.device
            )
        return self.cache[key]


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
            at[i] = [base + start - 1, *range(first, first + len(text) - start - 1)]
            ends[i] = len(ids) - 1 if tail else base + start - 1
        sizes.append(len(ids) - base)
        group.extend([g] * sizes[-1])
    if device.type == "cuda" and (room := -len(ids) % _FLEX_BLOCK):
        for each, filler in ((ids, 0), (branch, 0), (group, len(groups))):
            each.extend([filler] * room)
        position.extend(range(room))
        sizes.append(room)
    places = [torch.tensor(x, device=device) for x in (group, branch, position)]
    linear = [len(members) == 1 for members in groups] + [True] * (len(sizes) - len(groups))
    tree = Tree(places[0], places[1], places[2], sizes, linear, max(position) + 1)
    return torch.tensor([ids]), tree, torch.tensor([row for rows in at for row in rows]), torch.tensor(ends)


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
    return {"position_ids": tree.position[None], "attention_mask": mask, "tree": tree}


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
    scaling, sliding_window = options.get("scaling"), options.get("sliding_window")
    known = ("scaling", "sliding_window", *_NEUTRAL)
    if unknown := [name for name, value in options.items() if name not in known and value is not None]:
        raise ValueError(f"attention with {unknown[0]}")
    # Under autocast rotary positions leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    repeats = query.shape[1] // key.shape[1]
    if query.is_cuda:
        flex = _compiled_flex_attention()
        out = flex(query, key, value, block_mask=tree.block_mask(sliding_window), scale=scaling, enable_gqa=repeats > 1)
        return out.transpose(1, 2).contiguous(), None
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    parts = zip(*(x.split(tree.sizes, dim=2) for x in (query, key, value)), tree.masks(sliding_window), strict=True)
    outs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling).transpose(1, 2)
        for q, k, v, mask in parts
    ]
    return torch.cat(outs, dim=1), None


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
