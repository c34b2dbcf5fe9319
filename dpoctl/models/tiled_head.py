"""Log-probs of given tokens from hidden rows without a full logits tensor: head and softmax run over tiles of columns.

For each tile the forward pass keeps the softmax within the tile and the tile's share of the total probability. The
softmax over the vocabulary is their product, one factor per row, which the backward pass applies to the small matrices
around the two products, so that no element of a tile is rescaled. (torch's linear_cross_entropy computes gradients in
the forward pass, when a preference loss does not know the weight of a sequence yet.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_KEPT_BYTES = 1 << 30  # above this many bytes of softmax tiles the backward pass recomputes them
_COLUMNS = {"cpu": 1024}  # tile width: such products run near a CPU's peak, and their softmax stays in its cache
_WIDE = 16384  # tile width on other devices
_planned: str | None = None  # the type of device that a plan is for, where its tensors are elsewhere


@contextmanager
def as_on(device_type: str) -> Iterator[None]:
    """A context in which tiles are as wide as on another type of device."""
    global _planned
    before, _planned = _planned, device_type
    try:
        yield
    finally:
        _planned = before


def token_logps(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(rows @ weight.T + bias) at `targets`: [N] float32; rows [N, d], weight [V, d]; differentiable once.

    Products use the autocast precision where one is active; normalisers are float32 (float64 for float64 rows).
    """
    return _TokenLogps.apply(_cast(rows), weight, bias, targets)[0]


def target_logits_and_logps(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(logits [N], log-probs [N]) at `targets`, as of `token_logps`; both differentiable once, in one pass."""
    logps, logits = _TokenLogps.apply(_cast(rows), weight, bias, targets)
    return logits, logps


@torch.no_grad()
def logps_and_entropies(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs [N], entropies [N] in nats) of the next-token distributions; without gradient."""
    rows = _cast(rows)
    weight = weight.to(rows.dtype)
    sums, means = _Sums(), []
    at_target = _no_targets(rows, targets)
    for start, w, b in _tiles(weight, bias):
        logits = _logits(rows, w, b)
        softmax = sums.softmax(logits)
        means.append((softmax * logits).sum(-1))  # under the softmax within the tile
        at_target = _pick_targets(at_target, logits, targets, start)
    highest, log_sum, shares = sums.over_all()
    # The mean -log p within a tile, weighted by the tile's share, avoids a difference of large numbers.
    return (at_target - highest) - log_sum, (shares * (log_sum - (torch.stack(means) - highest))).sum(0)


@torch.no_grad()
def log_collisions(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """log sum_v p_v^2 [N] of the next-token distributions: the log-prob that two draws agree; without gradient."""
    rows = _cast(rows)
    sums, within = _Sums(), []
    for _, w, b in _tiles(weight.to(rows.dtype), bias):
        within.append(sums.softmax(_logits(rows, w, b)).square().sum(-1))
    _, _, shares = sums.over_all()
    return (shares.square() * torch.stack(within)).sum(0).log()


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # None for the logits, where only log-probs are used
        w_all = weight.to(rows.dtype)
        learning = any(ctx.needs_input_grad)
        keep = learning and rows.shape[0] * weight.shape[0] * rows.element_size() <= _KEPT_BYTES
        sums, kept = _Sums(), []
        at_target = _no_targets(rows, targets)
        for start, w, b in _tiles(w_all, bias):
            logits = _logits(rows, w, b)
            softmax = sums.softmax(logits)
            at_target = _pick_targets(at_target, logits, targets, start)
            if keep:
                kept.append(softmax.to(rows.dtype))
        highest, log_sum, shares = sums.over_all()
        if learning:
            ctx.save_for_backward(rows, weight, bias, targets, shares, *kept)
        return (at_target - highest) - log_sum, at_target

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, of_logits: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight, bias, targets, shares, *kept = ctx.saved_tensors
        w_all = weight.to(rows.dtype)
        need_rows, need_weight, need_bias, _ = ctx.needs_input_grad
        d_rows = torch.zeros_like(rows, dtype=shares.dtype) if need_rows else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        grad = torch.zeros_like(shares[0]) if grad is None else grad
        at_target = grad if of_logits is None else grad + of_logits
        factors = -grad * shares  # [tiles, N]: from a tile's softmax to its part of the logits' gradient
        for i, (start, w, b) in enumerate(_tiles(w_all, bias)):
            softmax = kept[i] if kept else _logits(rows, w, b).softmax(-1).to(rows.dtype)
            factor = factors[i][:, None]
            if d_rows is not None:
                d_rows.addcmul_((softmax @ w).to(d_rows.dtype), factor)
            if d_weight is not None:
                part, scaled = d_weight[start : start + len(w)], (factor * rows).to(rows.dtype)
                if part.dtype == rows.dtype:
                    torch.mm(softmax.t(), scaled, out=part)
                else:
                    part.copy_(softmax.t() @ scaled)
            if d_bias is not None:
                d_bias[start : start + len(w)] = (softmax.t() @ factor.to(rows.dtype))[:, 0]
        if d_rows is not None:
            d_rows = d_rows.addcmul_(w_all[targets].to(d_rows.dtype), at_target[:, None]).to(rows.dtype)
        if d_weight is not None:
            d_weight.index_add_(0, targets, (at_target[:, None] * rows).to(d_weight.dtype))
        if d_bias is not None:
            d_bias.index_add_(0, targets, at_target.to(d_bias.dtype))
        return d_rows, d_weight, d_bias, None


class _Sums:
    """The highest logit of each tile, and the sum of exp(logit - highest)."""

    def __init__(self) -> None:
        self.highest: list[Tensor] = []
        self.sums: list[Tensor] = []

    def softmax(self, logits: Tensor) -> Tensor:
        """The softmax within the tile; its highest probability is 1 / sum, so nothing is summed twice."""
        softmax = logits.softmax(-1)
        self.highest.append(logits.amax(-1))
        self.sums.append(softmax.amax(-1).reciprocal())
        return softmax

    def over_all(self) -> tuple[Tensor, Tensor, Tensor]:
        """(highest logit [N], log of the total sum [N], each tile's share of the probability [tiles, N])."""
        highest = torch.stack(self.highest)
        top = highest.amax(0)
        sums = torch.stack(self.sums) * (highest - top).exp()
        total = sums.sum(0)
        return top, total.log(), sums / total


@torch.no_grad()
def logits(output: Any, rows: Tensor) -> Tensor:
    """[N, V] logits of an output embedding, float32 where the device keeps the sums of its products; no gradient."""
    cast = _cast(rows)
    if keeps_float32_sums(cast.device, cast.dtype):
        return _logits(cast, output.weight.to(cast.dtype), getattr(output, "bias", None))
    return output(rows)


def _cast(rows: Tensor) -> Tensor:
    device = rows.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


def _tiles(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first column, weight [columns, d], bias [columns]) of each tile."""
    width = _COLUMNS.get(_planned or weight.device.type, _WIDE)
    for start in range(0, weight.shape[0], width):
        yield start, weight[start : start + width], None if bias is None else bias[start : start + width]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, columns], float32 or float64, of rows and weight of one dtype.

    Where the device can it keeps the float32 sums of the products: rounding them to bfloat16, whose step is 0.06 for
    logits of 8 to 16, would be half of the error of a log-prob in bfloat16.
    """
    if keeps_float32_sums(rows.device, rows.dtype):
        logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)
    logits = rows @ weight.t() if bias is None else torch.addmm(bias.to(rows.dtype), rows, weight.t())
    return logits if logits.dtype == torch.float64 else logits.float()


@cache
def keeps_float32_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device gives the float32 sums of products in `dtype`: some GPUs do; tried once."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    tried = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(tried, tried.t(), out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False


def _no_targets(rows: Tensor, targets: Tensor) -> Tensor:
    """The target tokens' logits [N] before the first tile: every one of them is replaced by `_pick_targets`."""
    return torch.zeros(targets.shape, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)


def _pick_targets(known: Tensor, logits: Tensor, targets: Tensor, start: int) -> Tensor:
    """The target tokens' logits [N]: from this tile where it contains them, else as `known`."""
    place = targets - start
    here = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where((place >= 0) & (place < logits.shape[1]), here, known)
