"""Log-probs of chosen tokens from hidden rows without a whole logits tensor: the vocabulary in tiles, forward and back.

Of each tile of columns its own softmax is kept, and the share of the whole probability that lies in the tile. The softmax
over the whole vocabulary is their product, a factor a row, which in the backward pass goes into the small matrices beside
the two products: no element of a tile is touched again. (torch's own linear_cross_entropy takes its gradients in the forward
pass, where a preference loss does not know yet how much a sequence weighs.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_KEPT_BYTES = 1 << 30  # above this many bytes of softmax tiles the backward pass computes them again
_COLUMNS = {
    "cpu": 1024
}  # of a tile: products of this width run near a CPU's peak, and their softmax stays in its cache
_WIDE = 16384  # elsewhere


def kept_bytes(rows: int, vocabulary: int, itemsize: int) -> int:
    """Bytes of softmax tiles that are held for the backward pass of so many rows; of one tile where that is too much."""
    whole = rows * vocabulary * itemsize
    return whole if whole <= _KEPT_BYTES else rows * min(vocabulary, _WIDE) * itemsize


def token_logps(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(rows @ weight.T + bias) at `targets`: [N] float32 from rows [N, d], weight [V, d]; differentiable once.

    Products take the autocast's precision where one is on; normalisers are float32 (float64 for float64 rows).
    """
    return _TokenLogps.apply(_cast(rows), weight, bias, targets)


@torch.no_grad()
def logps_and_entropies(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs [N], entropies [N] in nats) of the next-token distributions; without gradient."""
    rows = _cast(rows)
    weight, bias = _like(rows, weight, bias)
    sums, means, at_target = _Sums(), [], None
    for start, w, b in _tiles(weight, bias):
        logits = _logits(rows, w, b)
        softmax = sums.softmax(logits)
        means.append((softmax * logits).sum(-1))  # under the tile's own softmax
        at_target = _pick_targets(at_target, logits, targets, start)
    highest, log_sum, shares = sums.over_all()
    # -log p of a tile's tokens on average, weighted by the tile's share: no difference of large numbers
    return (at_target - highest) - log_sum, (shares * (log_sum - (torch.stack(means) - highest))).sum(0)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        w_all, b_all = _like(rows, weight, bias)
        learning = any(ctx.needs_input_grad)
        keep = learning and rows.shape[0] * weight.shape[0] * rows.element_size() <= _KEPT_BYTES
        sums, kept, at_target = _Sums(), [], None
        for start, w, b in _tiles(w_all, b_all):
            logits = _logits(rows, w, b)
            softmax = sums.softmax(logits)
            at_target = _pick_targets(at_target, logits, targets, start)
            if keep:
                kept.append(softmax.to(rows.dtype))
        highest, log_sum, shares = sums.over_all()
        if learning:
            ctx.save_for_backward(rows, weight, bias, targets, shares, *kept)
        return (at_target - highest) - log_sum

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, bias, targets, shares, *kept = ctx.saved_tensors
        w_all, b_all = _like(rows, weight, bias)
        need_rows, need_weight, need_bias, _ = ctx.needs_input_grad
        d_rows = torch.zeros_like(rows, dtype=shares.dtype) if need_rows else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        factors = -grad * shares  # [tiles, N]: what turns a tile's own softmax into a part of the logits' gradient
        for i, (start, w, b) in enumerate(_tiles(w_all, b_all)):
            softmax = kept[i] if kept else _logits(rows, w, b).softmax(-1).to(rows.dtype)
            factor = factors[i][:, None]
            if need_rows:
                d_rows.addcmul_((softmax @ w).to(d_rows.dtype), factor)
            if need_weight:
                part, scaled = d_weight[start : start + len(w)], (factor * rows).to(rows.dtype)
                if part.dtype == rows.dtype:
                    torch.mm(softmax.t(), scaled, out=part)
                else:
                    part.copy_(softmax.t() @ scaled)
            if need_bias:
                d_bias[start : start + len(w)] = (softmax.t() @ factor.to(rows.dtype))[:, 0]
        if need_rows:
            d_rows = d_rows.addcmul_(w_all[targets].to(d_rows.dtype), grad[:, None]).to(rows.dtype)
        if need_weight:
            d_weight.index_add_(0, targets, (grad[:, None] * rows).to(d_weight.dtype))
        if need_bias:
            d_bias.index_add_(0, targets, grad.to(d_bias.dtype))
        return d_rows, d_weight, d_bias, None


class _Sums:
    """The highest logit of each tile, and the sum of exp(logit - highest)."""

    def __init__(self) -> None:
        self.highest: list[Tensor] = []
        self.sums: list[Tensor] = []

    def softmax(self, logits: Tensor) -> Tensor:
        """The tile's own softmax; its highest probability is 1 / sum, so nothing is summed again."""
        softmax = logits.softmax(-1)
        self.highest.append(logits.amax(-1))
        self.sums.append(softmax.amax(-1).reciprocal())
        return softmax

    def over_all(self) -> tuple[Tensor, Tensor, Tensor]:
        """(highest logit [N], log of the sum over all [N], each tile's share of the probability [tiles, N])."""
        highest = torch.stack(self.highest)
        top = highest.amax(0)
        sums = torch.stack(self.sums) * (highest - top).exp()
        total = sums.sum(0)
        return top, total.log(), sums / total


def _cast(rows: Tensor) -> Tensor:
    device = rows.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


def _like(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)


def _tiles(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first column, weight [columns, d], bias [columns]) of each tile."""
    width = _COLUMNS.get(weight.device.type, _WIDE)
    for start in range(0, weight.shape[0], width):
        yield start, weight[start : start + width], None if bias is None else bias[start : start + width]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, columns], float32 or float64."""
    logits = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return logits if logits.dtype == torch.float64 else logits.float()


def _pick_targets(known: Tensor | None, logits: Tensor, targets: Tensor, start: int) -> Tensor:
    """The target tokens' logits [N] as far as this tile has them, the rest as known."""
    place = targets - start
    here = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    if known is None:
        return here
    return torch.where((place >= 0) & (place < logits.shape[1]), here, known)
