"""Log-probs of responses under a causal model: float32, summed over the response, and no whole logits tensor.

A sequence is `(ids, start)`: prompt and response tokens [T], of which `ids[start:]` (start >= 1) are the response. The
hidden state at t - 1 predicts token t, so the head is applied to the rows before response tokens only, tile by tile.
Sequences are padded on the right: under a causal mask no real token sees the padding, and positions need no shift.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..objectives.kl import kl

Sequences = Sequence[tuple[Sequence[int], int]]

_TILE_BYTES = 64 << 20  # float32 logits of one tile
_KEPT_BYTES = 1 << 30  # above this many bytes of logits the backward pass computes them again


def response_token_logps(model, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probs [N] float32, owner [N] int64) of all response tokens of a micro-batch; differentiable.

    `owner[i]` is the index of the sequence that token i belongs to. Logits are divided by `temperature`.
    """
    layout = lay_out(model, sequences)
    return token_logps(model, response_rows(model, layout), layout.targets, temperature)[0], layout.owner


def token_logps(
    model, rows: Tensor, targets: Tensor, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(log-probs [N] of `targets`, entropies [N] without gradient or None) from rows that `response_rows` gave."""
    size = max(16, _TILE_BYTES // (4 * _vocabulary(model)))
    again = torch.is_grad_enabled() and rows.shape[0] * _vocabulary(model) * 4 > _KEPT_BYTES
    tiles, entropies = [], []
    for h, y in zip(rows.split(size), targets.split(size), strict=True):
        args = (model, h, y, temperature)
        if entropy:
            logps = F.log_softmax(_logits(model, h) / temperature, dim=-1)
            tiles.append(logps.gather(1, y[:, None])[:, 0])
            entropies.append(-(logps.detach().exp().mul_(logps.detach())).sum(-1))
        else:
            tiles.append(checkpoint(_tile_logps, *args, use_reentrant=False) if again else _tile_logps(*args))
    return torch.cat(tiles), torch.cat(entropies) if entropy else None


def summed_logps(model, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Response log-probs [B] float32, summed over each sequence's response; differentiable."""
    logps, owner = response_token_logps(model, sequences, temperature)
    return logps.new_zeros(len(sequences)).index_add(0, owner, logps)


@torch.no_grad()
def response_logps(model, sequences: Sequences, *, tokens_per_batch: int, temperature: float = 1.0) -> Tensor:
    """Summed response log-probs [N] float32 on the CPU, in micro-batches of similar length."""
    result = torch.empty(len(sequences))
    for indices in micro_batches([len(ids) for ids, _ in sequences], tokens_per_batch):
        result[indices] = summed_logps(model, [sequences[i] for i in indices], temperature).float().cpu()
    return result


@torch.no_grad()
def policy_kl(policy, reference, sequences: Sequences, *, tokens_per_batch: int, temperature: float = 1.0):
    """(log-ratios [N], exact KLs [N], reference log-probs at temperature 1 [N]) of the policy's own samples.

    The log-ratio is sum_t [log pi - log pi_ref] of the sampled tokens, whose mean estimates the sequence KL; the exact
    form sums over time the KL of the two next-token distributions, which has the same mean and a lower variance.
    """
    log_ratio, exact, ref_logps = (torch.zeros(len(sequences)) for _ in range(3))
    for indices in micro_batches([len(ids) for ids, _ in sequences], tokens_per_batch):
        batch = [sequences[i] for i in indices]
        layout = lay_out(policy, batch)
        hidden_p, hidden_r = response_rows(policy, layout), response_rows(reference, layout)
        targets, owner = layout.targets, layout.owner
        rows = max(16, _TILE_BYTES // (4 * _vocabulary(policy)))
        sums = torch.zeros(3, len(batch), device=hidden_p.device)
        tiles = (t.split(rows) for t in (hidden_p, hidden_r, targets, owner))
        for hp, hr, y, own in zip(*tiles, strict=True):
            logits_r = _logits(reference, hr)
            p = F.log_softmax(_logits(policy, hp) / temperature, dim=-1)
            r = F.log_softmax(logits_r / temperature, dim=-1)
            sums[0].index_add_(0, own, (p - r).gather(1, y[:, None])[:, 0])
            sums[1].index_add_(0, own, kl(p, r))
            sums[2].index_add_(0, own, -F.cross_entropy(logits_r, y, reduction="none"))
        log_ratio[indices], exact[indices], ref_logps[indices] = sums.cpu()
    return log_ratio, exact, ref_logps


def micro_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, each group at most `tokens_per_batch` tokens with its padding."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > tokens_per_batch:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@dataclass(frozen=True)
class Layout:
    """A padded micro-batch and where its response tokens stand: `owner` and `column` index ids [B, T]; targets [N]."""

    ids: Tensor
    owner: Tensor
    column: Tensor
    targets: Tensor


def lay_out(model, sequences: Sequences) -> Layout:
    """The micro-batch on the model's device, padded on the right."""
    device = next(model.parameters()).device
    width = max(len(ids) for ids, _ in sequences)
    padded = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids, _ in sequences])
    column = torch.cat([torch.arange(start, len(ids)) for ids, start in sequences])
    owner = torch.cat([torch.full((len(ids) - start,), b) for b, (ids, start) in enumerate(sequences)])
    targets = padded[owner, column].to(device)
    return Layout(padded.to(device), owner.to(device), column.to(device), targets)


def response_rows(model, layout: Layout, hidden: Tensor | None = None) -> Tensor:
    """Hidden rows [N, d] (or logits [N, V], see has_plain_head) that predict the response tokens.

    `hidden` are the trunk's last states, where the caller has them.
    """
    if not has_plain_head(model):
        rows = model(input_ids=layout.ids, use_cache=False).logits
    elif hidden is None:
        rows = model.base_model(input_ids=layout.ids, use_cache=False).last_hidden_state
    else:
        rows = hidden
    return rows[layout.owner, layout.column - 1]


def has_plain_head(model) -> bool:
    """Whether logits are the output embedding of the last hidden state and nothing else; tried once per model.

    Some architectures scale or cap their logits behind the head: for them the model's own logits are taken.
    """
    known = getattr(model, "_dpoctl_plain_head", None)
    if known is None:
        known = model._dpoctl_plain_head = _try_plain_head(model)
    return known


@torch.no_grad()
def _try_plain_head(model) -> bool:
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    device = next(model.parameters()).device
    ids = torch.arange(min(8, _vocabulary(model)), device=device)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    own = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    return own.shape == logits.shape and bool((own - logits).abs().max() <= 1e-3 * logits.abs().max() + 1e-6)


def _vocabulary(model) -> int:
    return model.get_input_embeddings().num_embeddings


def _logits(model, rows: Tensor) -> Tensor:
    return (model.get_output_embeddings()(rows) if has_plain_head(model) else rows).float()


def _tile_logps(model, rows: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = _logits(model, rows)
    return -F.cross_entropy(logits / temperature if temperature != 1.0 else logits, targets, reduction="none")
