"""Sample the next token of each row from its logits, by inverting the cumulative distribution.

One uniform number decides a row's token, so a row's samples do not depend on which rows share the batch, as they would
with a common stream of random numbers. It is also fast: a multinomial draw over a vocabulary of 50,000 takes as many
random numbers for each row.
"""

import hashlib

import numpy as np
import torch

from ..errors import NumericalError
from ..runtime.devices import to_device

_TILE = 256  # tokens per tile of the two-level search, about sqrt(50,000)
_HEAD_TILE = 1024  # tokens per tile of the head's product: its logits stay in a core's cache
_HEAD_TILES = 8  # tiles in one product below float32: a processor's matrix units need larger ones
_NOT_FINITE = "the model's logits are not finite: damaged weights, or an overflow in its dtype"
_NO_TOKEN, _UNDECIDED = -1, -2  # in place of a token id
_FIRST_NUCLEUS = 128  # most likely tokens examined first with top-p; more where these hold too little probability


def uniforms(seed: int, prompt_key: str, k: int, n: int) -> np.ndarray:
    """[n] float64 in [0, 1): the random numbers of sample `k` of a prompt, a function of (seed, prompt_key, k) alone.

    From Philox, a counter-based generator, keyed by 128 bits of BLAKE2b over the three. A shorter request gives
    a prefix of a longer one.
    """
    digest = hashlib.blake2b(f"{seed}\0{k}\0{prompt_key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n)


def sample_token(
    logits: torch.Tensor, u: torch.Tensor | None, *, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """[rows] token ids drawn from softmax(logits / temperature), restricted to top-k, then to the top-p nucleus.

    `logits` [rows, vocabulary] of any float dtype, `u` [rows] float64 in [0, 1). Temperature 0 takes the most likely
    token and needs no `u`. top_k 0 and top_p 1 exclude nothing; the nucleus is the smallest set of most likely tokens
    whose probability (renormalised after top-k) reaches top_p, at least one. A token of probability 0 is never drawn.
    `logits` in float32 are overwritten, because new memory at each step would cost as much as the arithmetic.
    Raises NumericalError where a row holds a NaN or +infinity. The result is on the CPU: the host waits for the device
    once, with top-p again where the most likely tokens that are examined first hold too little.
    """
    highest = logits.amax(-1, keepdim=True)
    finite = highest[:, 0].isfinite()  # a NaN is the highest of its row
    if temperature == 0:
        return _read(logits.argmax(-1), finite)
    if u is None:
        raise ValueError("sampling at a temperature above 0 needs random numbers")
    weights = logits.float().sub_(highest).div_(temperature).exp_()  # unnormalised, the most likely is 1
    if top_k > 0 or top_p < 1:
        return _sample_nucleus(weights, u, min(top_k or weights.shape[-1], weights.shape[-1]), top_p, finite)
    rows, width = weights.shape
    tiles, tiled = width // _TILE, width - width % _TILE
    sums = weights[:, :tiled].view(rows, tiles, _TILE).sum(-1)
    sums = torch.cat([sums, weights[:, tiled:].sum(-1, keepdim=True)], dim=-1)
    tile, share = _search(sums, u)
    ids = tile[:, None] * _TILE + torch.arange(_TILE, device=tile.device)
    inside = weights.gather(-1, ids.clamp(max=width - 1)).masked_fill_(ids >= width, 0.0)
    return _read(tile * _TILE + _search(inside, share)[0], finite)


def _read(tokens: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """The tokens [rows] on the CPU. Raises NumericalError where a row is not finite."""
    found = torch.where(finite, tokens, _NO_TOKEN).cpu()
    if (found == _NO_TOKEN).any():
        raise NumericalError(_NOT_FINITE)
    return found


def sample_token_from_states(
    states: torch.Tensor, weight: torch.Tensor, u: torch.Tensor, temperature: float
) -> torch.Tensor:
    """[rows] token ids drawn from softmax(states @ weight.T / temperature), on a CPU: head and `sample_token` fused.

    `states` [rows, d], `weight` [vocabulary, d] of one dtype, `u` [rows] float64 in [0, 1). Each tile of logits is
    exponentiated while it is in the cache, and `weight @ states.T` is the layout that runs near the peak for few rows.
    Raises NumericalError as `sample_token` does.
    """
    rows, width = len(states), len(weight)
    tiles = -(-width // _HEAD_TILE)
    weights = torch.empty(tiles * _HEAD_TILE, rows)
    weights[width:] = 0.0
    highest, sums = torch.empty(2, tiles, rows)
    exact = states.dtype == torch.float32
    columns = (states / temperature if exact else states).t().contiguous()
    rounded = columns.new_empty(0)
    for n in range(tiles):
        start, end = n * _HEAD_TILE, min((n + 1) * _HEAD_TILE, width)
        part = weights[start:end]
        if exact:
            torch.mm(weight[start:end], columns, out=part)
        else:  # a wider product, which such dtypes need; its logits are rounded, the temperature is not
            if n % _HEAD_TILES == 0:
                rounded = torch.mm(weight[start : start + _HEAD_TILES * _HEAD_TILE], columns)
            first = n % _HEAD_TILES * _HEAD_TILE
            part.copy_(rounded[first : first + _HEAD_TILE])
            if temperature != 1:
                part.div_(temperature)
        torch.amax(part, 0, out=highest[n])
        torch.sum(part.sub_(highest[n]).exp_(), 0, out=sums[n])
    top = highest.amax(0)
    if not top.isfinite().all():
        raise NumericalError(_NOT_FINITE)
    tile, share = _search((sums * (highest - top).exp()).t(), u)
    ids = tile[:, None] * _HEAD_TILE + torch.arange(_HEAD_TILE)
    inside = weights[ids, torch.arange(rows)[:, None]]
    return tile * _HEAD_TILE + _search(inside, share)[0]


def _search(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index [rows] of the first weight whose running sum exceeds u * total, and the position within it in [0, 1].

    `weights` [rows, n], not negative, `u` [rows] float64 in [0, 1). Sums are float64.
    """
    running = _running_sums(weights.double())
    total = running[:, -1:]
    # Below the total even after rounding, so that the weight at the index is above 0.
    target = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(running, target, right=True).clamp(max=weights.shape[-1] - 1)  # where there are NaNs
    top = running.gather(-1, index)
    below = torch.where(index > 0, running.gather(-1, (index - 1).clamp(min=0)), 0.0)
    return index[:, 0], ((target - below) / (top - below))[:, 0].clamp(0.0, 1.0)


def _running_sums(weights: torch.Tensor) -> torch.Tensor:
    """The running sums [rows, n] of float64 weights that are not negative; equal calls give equal sums."""
    return weights.cumsum(-1) if weights.device.type == "cpu" else _sums_of_integers(weights)


def _sums_of_integers(weights: torch.Tensor) -> torch.Tensor:
    """Running sums for a GPU, which adds floats in an order that may change.

    Weights are rounded down to multiples of their row's largest over about 2^51 / n, whose sums float64 holds exactly.
    What is less than one multiple is never drawn: below 1e-10 of the largest weight for n of 10,000.
    """
    unit = weights.amax(-1, keepdim=True) / 2.0 ** (52 - weights.shape[-1].bit_length())
    return torch.where(unit > 0, weights / unit, 0.0).long().cumsum(-1).double() * unit


def _sample_nucleus(
    weights: torch.Tensor, u: torch.Tensor, top_k: int, top_p: float, finite: torch.Tensor
) -> torch.Tensor:
    """As `sample_token`, from unnormalised probabilities [rows, vocabulary] by their largest entries.

    Sorting the full vocabulary is slow and the nucleus is usually small: examine a few of the most likely tokens, and
    more only for the rows where these hold less than top_p of the total.
    """
    chosen = torch.empty(len(weights), dtype=torch.long)
    open_rows = list(range(len(weights)))
    examined = top_k if top_p >= 1 or top_k < weights.shape[-1] else min(_FIRST_NUCLEUS, top_k)
    while open_rows:
        at = to_device(torch.tensor(open_rows), weights.device)
        part = weights[at]
        largest, ids = part.topk(examined)
        largest = largest.double()
        total = largest.sum(-1) if examined == top_k else part.sum(-1, dtype=torch.float64)
        before = _running_sums(largest) - largest
        kept = before < (top_p * total)[:, None]
        kept[:, 0] = True
        index, _ = _search(largest * kept, u[at])
        tokens = ids.gather(-1, index[:, None])[:, 0]
        if examined < top_k:
            tokens = tokens.masked_fill(kept[:, -1], _UNDECIDED)
        found = _read(tokens, finite[at])
        chosen[open_rows] = found
        open_rows = [row for row, token in zip(open_rows, found.tolist(), strict=True) if token == _UNDECIDED]
        examined = min(examined * 8, top_k)
    return chosen
