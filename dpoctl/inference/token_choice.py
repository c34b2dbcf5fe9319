"""Choose the next token of each row from its logits, by the inverse of the cumulative distribution.

One uniform number decides a row's token, so that a row's draws are its own: they do not depend on which rows share
the batch, as a stream shared by all of them would. It is also the fast way: a multinomial draw over a vocabulary of
50,000 takes as many random numbers for each row.
"""

import hashlib

import numpy as np
import torch

from ..errors import NumericalError

_TILE = 256  # tokens a tile of the two-level search; sqrt(50,000) or so is best
_HEAD_TILE = 1024  # tokens a tile of the head's product: its logits stay in a core's cache
_NOT_FINITE = "the model's logits are not finite: its weights or its dtype do not hold"
_FIRST_NUCLEUS = 128  # most likely tokens looked at first when top-p is on; more where they hold too little


def uniforms(seed: int, prompt_key: str, k: int, n: int) -> np.ndarray:
    """[n] float64 in [0, 1): the random numbers of sample `k` of a prompt, a function of (seed, prompt_key, k) alone.

    Philox, a counter-based generator, keyed by 128 bits of BLAKE2b over the three. The first n of a longer request
    are those of a shorter one.
    """
    digest = hashlib.blake2b(f"{seed}\0{k}\0{prompt_key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n)


def sample_token(
    logits: torch.Tensor, u: torch.Tensor | None, *, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """[rows] token ids drawn from softmax(logits / temperature), cut to top-k, then to the top-p nucleus.

    `logits` [rows, vocabulary] of any float dtype, `u` [rows] float64 in [0, 1). Temperature 0 takes the likeliest
    token and needs no `u`. top_k 0 and top_p 1 cut nothing; the nucleus is the smallest set of likeliest tokens whose
    probability (renormalised after top-k) reaches top_p, at least one. A token of probability 0 is never drawn.
    `logits` in float32 are overwritten: fresh memory for each step's millions would cost as much as the arithmetic.
    Raises NumericalError where a row holds a NaN or an infinity above.
    """
    highest = logits.amax(-1, keepdim=True)
    if not highest.isfinite().all():  # a NaN is the highest of its row
        raise NumericalError(_NOT_FINITE)
    if temperature == 0:
        return logits.argmax(-1)
    weights = logits.float().sub_(highest).div_(temperature).exp_()  # unnormalised, the likeliest is 1
    if top_k > 0 or top_p < 1:
        return _pick_nucleus(weights, u, min(top_k or weights.shape[-1], weights.shape[-1]), top_p)
    rows, width = weights.shape
    tiles, whole = width // _TILE, width - width % _TILE
    sums = weights[:, :whole].view(rows, tiles, _TILE).sum(-1)
    sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    tile, share = _search(sums, u)
    ids = tile[:, None] * _TILE + torch.arange(_TILE, device=tile.device)
    inside = weights.gather(-1, ids.clamp(max=width - 1)).masked_fill_(ids >= width, 0.0)
    return tile * _TILE + _search(inside, share)[0]


def sample_token_from_states(
    states: torch.Tensor, weight: torch.Tensor, u: torch.Tensor, temperature: float
) -> torch.Tensor:
    """[rows] token ids drawn from softmax(states @ weight.T / temperature), on a CPU: the head and `pick` in one.

    `states` [rows, d], `weight` [vocabulary, d], `u` [rows] float64 in [0, 1). Tile by tile the logits are turned into
    weights while they are in the cache, and `weight @ states.T` is the shape that runs near the peak for few rows.
    Raises NumericalError as `pick` does.
    """
    rows, width = len(states), len(weight)
    tiles = -(-width // _HEAD_TILE)
    weights = torch.empty(tiles * _HEAD_TILE, rows)
    weights[width:] = 0.0
    highest, sums = torch.empty(2, tiles, rows)
    columns = (states / temperature).t().contiguous()
    for tile in range(tiles):
        start, end = tile * _HEAD_TILE, min((tile + 1) * _HEAD_TILE, width)
        part = torch.mm(weight[start:end], columns, out=weights[start:end])
        torch.amax(part, 0, out=highest[tile])
        torch.sum(part.sub_(highest[tile]).exp_(), 0, out=sums[tile])
    top = highest.amax(0)
    if not top.isfinite().all():
        raise NumericalError(_NOT_FINITE)
    tile, share = _search((sums * (highest - top).exp()).t(), u)
    ids = tile[:, None] * _HEAD_TILE + torch.arange(_HEAD_TILE)
    inside = weights[ids, torch.arange(rows)[:, None]]
    return tile * _HEAD_TILE + _search(inside, share)[0]


def _search(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index [rows] of the first weight whose running sum passes u * total, and the share of that weight passed.

    `weights` [rows, n], not negative, `u` [rows] float64 in [0, 1). Sums are float64.
    """
    running = weights.double().cumsum(-1)
    total = running[:, -1:]
    # Below the total even after rounding: the index found then has a weight above 0.
    target = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(running, target, right=True)
    top = running.gather(-1, index)
    below = torch.where(index > 0, running.gather(-1, (index - 1).clamp(min=0)), 0.0)
    return index[:, 0], ((target - below) / (top - below))[:, 0].clamp(0.0, 1.0)


def _pick_nucleus(weights: torch.Tensor, u: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """As `pick`, from unnormalised probabilities [rows, vocabulary], by their sorted head.

    Sorting a whole vocabulary is slow and the nucleus is nearly always small: look at the likeliest few, and at more
    only for the rows where these do not hold top_p of the whole.
    """
    chosen = torch.empty(len(weights), dtype=torch.long, device=weights.device)
    todo = torch.arange(len(weights), device=weights.device)
    seen = top_k if top_p >= 1 or top_k < weights.shape[-1] else min(_FIRST_NUCLEUS, top_k)
    while len(todo):
        part = weights[todo]
        likeliest, ids = part.topk(seen)
        likeliest = likeliest.double()
        whole = likeliest.sum(-1) if seen == top_k else part.sum(-1, dtype=torch.float64)
        before = likeliest.cumsum(-1) - likeliest
        kept = before < (top_p * whole)[:, None]
        kept[:, 0] = True
        sure = torch.full_like(todo, seen == top_k, dtype=torch.bool) | ~kept[:, -1]
        index, _ = _search((likeliest * kept)[sure], u[todo[sure]])
        chosen[todo[sure]] = ids[sure].gather(-1, index[:, None])[:, 0]
        todo, seen = todo[~sure], min(seen * 8, top_k)
    return chosen
