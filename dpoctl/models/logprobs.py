"""Log-probs of responses under a causal model: float32, summed over the response, and no whole logits tensor.

A sequence is `(ids, start)`: prompt and response tokens [T], of which `ids[start:]` (start >= 1) are the response. The
hidden state at t - 1 predicts token t, so the head is applied to the rows before response tokens only, and the last token
of a response, which predicts nothing, is not forwarded. A micro-batch is one packed row in which the completions of a
prompt share it (`packed`); for an architecture that cannot take that it is padded on the right, where under a causal mask
no real token sees the padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import log
from ..objectives.kl import kl
from ..runtime.fsdp_root import with_gathered_weights
from . import packed, tiled_head

Sequences = Sequence[tuple[Sequence[int], int]]

_TILE_BYTES = 64 << 20  # float32 logits of one tile, where whole distributions are compared


def response_token_logps(model, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probs [N] float32, owner [N] int64) of all response tokens of a micro-batch; differentiable.

    `owner[i]` is the index of the sequence that token i belongs to. Logits are divided by `temperature`.
    """

    def forward() -> tuple[Tensor, Tensor]:
        layout = lay_out([model], sequences)
        return token_logps(model, response_rows(model, layout), layout.targets, temperature)[0], layout.owner

    return with_gathered_weights(model, forward)


def token_logps(
    model, rows: Tensor, targets: Tensor, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(log-probs [N] of `targets`, entropies [N] or None) from rows that `response_rows` gave; no gradient with entropy."""
    if not has_plain_head(model):  # the rows are logits
        logps = F.log_softmax(rows.float() / temperature, dim=-1)
        return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1) if entropy else None
    output = model.get_output_embeddings()
    rows = rows if temperature == 1.0 else rows / temperature
    bias = getattr(output, "bias", None)
    bias = bias if bias is None or temperature == 1.0 else bias / temperature
    if entropy:
        return tiled_head.logps_and_entropies(rows, output.weight, bias, targets)
    return tiled_head.token_logps(rows, output.weight, bias, targets), None


def summed_logps(model, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Response log-probs [B] float32, summed over each sequence's response; differentiable."""
    logps, owner = response_token_logps(model, sequences, temperature)
    return logps.new_zeros(len(sequences)).index_add(0, owner, logps)


@torch.no_grad()
def response_logps(model, sequences: Sequences, *, tokens_per_batch: int, temperature: float = 1.0) -> Tensor:
    """Summed response log-probs [N] float32 on the CPU, in micro-batches that keep a prompt's completions together."""
    result = torch.empty(len(sequences))
    for indices in micro_batches(sequences, tokens_per_batch):
        result[indices] = summed_logps(model, [sequences[i] for i in indices], temperature).float().cpu()
    return result


@torch.no_grad()
def policy_kl(policy, reference, sequences: Sequences, *, tokens_per_batch: int, temperature: float = 1.0):
    """(log-ratios [N], exact KLs [N], reference log-probs at temperature 1 [N]) of the policy's own samples.

    The log-ratio is sum_t [log pi - log pi_ref] of the sampled tokens, whose mean estimates the sequence KL; the exact
    form sums over time the KL of the two next-token distributions, which has the same mean and a lower variance.
    """
    log_ratio, exact, ref_logps = (torch.zeros(len(sequences)) for _ in range(3))
    for indices in micro_batches(sequences, tokens_per_batch):
        layout = lay_out([policy, reference], [sequences[i] for i in indices])
        hidden_p, hidden_r = response_rows(policy, layout), response_rows(reference, layout)
        rows = max(16, _TILE_BYTES // (4 * _vocabulary(policy)))
        sums = torch.zeros(3, len(indices), device=hidden_p.device)
        tiles = (t.split(rows) for t in (hidden_p, hidden_r, layout.targets, layout.owner))
        for hp, hr, y, own in zip(*tiles, strict=True):
            logits_r = _logits(reference, hr)
            p = F.log_softmax(_logits(policy, hp) / temperature, dim=-1)
            r = F.log_softmax(logits_r / temperature, dim=-1)
            sums[0].index_add_(0, own, (p - r).gather(1, y[:, None])[:, 0])
            sums[1].index_add_(0, own, kl(p, r))
            sums[2].index_add_(0, own, -F.cross_entropy(logits_r, y, reduction="none"))
        log_ratio[indices], exact[indices], ref_logps[indices] = sums.cpu()
    return log_ratio, exact, ref_logps


def micro_batches(sequences: Sequences, tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices in groups of at most `tokens_per_batch` tokens, one sequence at least; those of one prompt side by side.

    Longer prompts' sequences come first, so that a padded batch holds similar lengths.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, start) in enumerate(sequences):
        by_prompt.setdefault(tuple(ids[:start]), []).append(i)
    longest = {p: max(len(sequences[i][0]) for i in members) for p, members in by_prompt.items()}
    group: list[int] = []
    tokens = 0
    for prompt in sorted(by_prompt, key=lambda p: -longest[p]):
        for i in by_prompt[prompt]:
            size = len(sequences[i][0])
            if group and tokens + size > tokens_per_batch:
                yield group
                group, tokens = [], 0
            group.append(i)
            tokens += size
    if group:
        yield group


@dataclass(frozen=True)
class Layout:
    """A micro-batch of B sequences as the model's input, and where its response tokens stand.

    `ids` [rows, T]; `at` [N]: places in the flattened ids whose hidden states predict the response tokens `targets` [N] of
    the sequences `owner` [N]; `ends` [B]: places of the last tokens; `tree` where the input is one packed row.
    """

    ids: Tensor
    at: Tensor
    owner: Tensor
    targets: Tensor
    ends: Tensor
    tree: packed.Tree | None


def lay_out(models: Sequence, sequences: Sequences, *, whole: bool = False) -> Layout:
    """The micro-batch on the models' device: packed where all `models` can take that, else padded on the right.

    `whole`: the last tokens are forwarded too, whose hidden states a reward is read from.
    """
    device = next(models[0].parameters()).device
    if all(can_pack(model) for model in models):
        width = models[0].config.get_text_config().hidden_size
        ids, tree, at, ends = packed.pack(sequences, width, device, whole=whole)
    else:
        ids, at, ends = _padded(sequences, models[0])
        tree = None
    owner = torch.tensor([i for i, (s, start) in enumerate(sequences) for _ in range(start, len(s))])
    targets = torch.tensor([t for s, start in sequences for t in s[start:]])
    return Layout(ids.to(device), at.to(device), owner.to(device), targets.to(device), ends.to(device), tree)


def _padded(sequences: Sequences, model) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], at [N], ends [B]), padded on the right."""
    pad = model.config.get_text_config().pad_token_id or 0
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([list(s) + [pad] * (width - len(s)) for s, _ in sequences])
    at = torch.cat([torch.arange(start - 1, len(s) - 1) + b * width for b, (s, start) in enumerate(sequences)])
    ends = torch.tensor([b * width + len(s) - 1 for b, (s, _) in enumerate(sequences)])
    return ids, at, ends


def trunk_states(model, layout: Layout) -> Tensor:
    """Last hidden states [places, d] of a model's trunk (of a bare trunk: its own)."""
    return model.base_model(**_inputs(layout)).last_hidden_state.flatten(0, 1)


def response_rows(model, layout: Layout, states: Tensor | None = None) -> Tensor:
    """Hidden rows [N, d] (or logits [N, V], see has_plain_head) that predict the response tokens.

    `states` are the trunk's last states, where the caller has them.
    """
    if not has_plain_head(model):
        return model(**_inputs(layout)).logits.flatten(0, 1).index_select(0, layout.at)
    states = trunk_states(model, layout) if states is None else states
    return states.index_select(0, layout.at)  # whose gradient adds up in one order, as that of states[at] does not


def _inputs(layout: Layout) -> dict:
    if layout.tree is None:
        return {"input_ids": layout.ids, "use_cache": False}
    return {"input_ids": layout.ids, "use_cache": False} | packed.arguments(layout.tree)


def can_pack(model) -> bool:
    """Whether a packed row gives the model's hidden states as a padded batch does; tried once per model, said if not.

    The model's attention is set to `packed.attend`, which is transformers' own where there is no tree.
    """
    known = getattr(model, "_dpoctl_can_pack", None)
    if known is None:
        known = model._dpoctl_can_pack = _try_packing(model)
        if not known:
            log.say(f"{type(model).__name__}: batches are padded, since packing gives other numbers with it")
    return known


@torch.no_grad()
def _try_packing(model) -> bool:
    device = next(model.parameters()).device
    vocabulary = _vocabulary(model)
    texts = [(0, 1, 2, 3, 4), (0, 1, 2, 5, 6, 7, 8), (9, 8, 7)]
    sequences = [([t % vocabulary for t in text], 2) for text in texts]
    before = model.config._attn_implementation
    ids, at, _ = _padded(sequences, model)
    with torch.autocast(device.type, enabled=False):
        expected = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state.flatten(0, 1)[at]
        try:
            model.set_attn_implementation(packed.NAME)
            row, tree, at, _ = packed.pack(sequences, 1 << 20, device, whole=False)
            states = model.base_model(input_ids=row.to(device), use_cache=False, **packed.arguments(tree))
            own = states.last_hidden_state.flatten(0, 1)[at]
            same = bool((own - expected).abs().max() <= 1e-3 * expected.abs().max())
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as e:
            log.detail(f"{type(model).__name__} cannot take a packed row: {type(e).__name__}: {e}")
            same = False
    if not same:
        model.set_attn_implementation(before)
    return same


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
    output = model.get_output_embeddings()
    if output is None or model.base_model is model:
        return False
    device = next(model.parameters()).device
    ids = torch.arange(min(8, _vocabulary(model)), device=device)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    own = output(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    return own.shape == logits.shape and bool((own - logits).abs().max() <= 1e-3 * logits.abs().max() + 1e-6)


def _vocabulary(model) -> int:
    return model.get_input_embeddings().num_embeddings


def _logits(model, rows: Tensor) -> Tensor:
    return (model.get_output_embeddings()(rows) if has_plain_head(model) else rows).float()
