"""Log-probs of responses under a causal model: float32, summed over the response, without a full logits tensor.

A sequence is `(ids, start)`: prompt and response tokens [T], of which `ids[start:]` (start >= 1) are the response, but
for those between the messages of an answer of several (`data.gaps`): "response tokens" leaves these out. The hidden
state at t - 1 predicts token t, so the head is applied only to the positions before response tokens, and the last token
of a response, which predicts nothing, is not forwarded. A micro-batch is one packed row in which the completions of a
prompt share it (`packed`). For architectures that do not support this it is padded on the right, where the causal mask
hides the padding from every real token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data.gaps import gaps_of, kept
from ..objectives.kl import kl
from ..runtime import collectives
from ..runtime.devices import to_device
from ..runtime.fsdp_root import with_gathered_weights
from ..runtime.sharing import in_rounds
from . import packed, rope, tiled_head
from .perturbation import next_logits, perturbation_of
from .probes import can_pack, has_plain_head, require_causal, trunk_of, vocabulary
from .routing import RoutedTokens, recorded

Sequences = Sequence[tuple[Sequence[int], int]]
SHORTEST: Sequences = [([0, 0], 1)]  # what a rank forwards that has no micro-batch left

_TILE_BYTES = 64 << 20  # float32 logits of one tile, where full distributions are compared


def response_token_logps(
    model: PreTrainedModel, sequences: Sequences, temperature: float = 1.0, routed: RoutedTokens | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probs [N] float32, owner [N] int64) of all response tokens of a micro-batch; differentiable.

    `owner[i]` is the index of the sequence that token i belongs to. Logits are divided by `temperature`. `routed`
    records the routing of a mixture of experts.
    """

    return with_gathered_weights(model, partial(_response_token_logps, model, sequences, temperature, routed))


def _response_token_logps(
    model: PreTrainedModel, sequences: Sequences, temperature: float, routed: RoutedTokens | None
) -> tuple[Tensor, Tensor]:
    layout = lay_out([model], sequences, routed=routed)
    return token_logps(model, response_rows(model, layout), layout.targets, temperature)[0], layout.owner


def aligned_token_logps(
    model: PreTrainedModel, sequences: Sequences, routed: RoutedTokens | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs [N], owner [N], alignments [N]) of all response tokens, as `response_token_logps` at temperature 1.

    An alignment is log p of the token less log sum_v p_v^2 of its distribution, without gradient: at most 0 on average
    over the model's own samples, it tells how far a text is from these (WPO, 2406.11827, section 3.2).
    """
    return with_gathered_weights(model, partial(_aligned_token_logps, model, sequences, routed))


def _aligned_token_logps(
    model: PreTrainedModel, sequences: Sequences, routed: RoutedTokens | None
) -> tuple[Tensor, Tensor, Tensor]:
    layout = lay_out([model], sequences, routed=routed)
    rows = response_rows(model, layout)
    logps = token_logps(model, rows, layout.targets, 1.0)[0]
    output, known = model.get_output_embeddings(), rows.detach()
    if has_plain_head(model):
        collisions = tiled_head.log_collisions(known, output.weight, getattr(output, "bias", None))
    else:  # the rows are logits
        collisions = (2.0 * F.log_softmax(known.float(), dim=-1)).logsumexp(-1)
    return logps, layout.owner, logps.detach() - collisions


def token_logps(
    model: PreTrainedModel, rows: Tensor, targets: Tensor, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(log-probs [N] of `targets`, entropies [N] or None) from `response_rows`; no gradient with entropy.

    They are those of the model's own head; of one that is decoded otherwise they are not asked for.
    """
    if perturbation_of(model):
        raise ValueError("log-probs of the own head of a model that is decoded with other logits")
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


def summed_logps(
    model: PreTrainedModel, sequences: Sequences, temperature: float = 1.0, routed: RoutedTokens | None = None
) -> Tensor:
    """Response log-probs [B] float32, summed over each sequence's response; differentiable."""
    logps, owner = response_token_logps(model, sequences, temperature, routed)
    return logps.new_zeros(len(sequences)).index_add(0, owner, logps)


@torch.no_grad()
def response_logps(
    model: PreTrainedModel, sequences: Sequences, *, tokens_per_batch: int, temperature: float = 1.0
) -> Tensor:
    """Summed response log-probs [N] float32 on the CPU, in micro-batches that keep a prompt's completions together.

    The ranks of a process group share the micro-batches, and every rank gets all log-probs.
    """
    return shared_values(model, sequences, partial(summed_logps, temperature=temperature), tokens_per_batch)


@torch.no_grad()
def shared_values(
    model: PreTrainedModel,
    sequences: Sequences,
    values_of: Callable[[Any, Sequences], Tensor],
    tokens_per_batch: int,
    after_round: Callable[[], None] = lambda: None,
) -> Tensor:
    """A value [N] float32 on the CPU of each sequence; `values_of(model, sequences)` [B] gives those of a micro-batch.

    The ranks of a process group share the micro-batches, which do not depend on their number, and every rank gets all
    values. They are read from the device once, at the end, so that the next micro-batch is laid out while one is
    computed. `after_round` is called when each rank has started a micro-batch, and may raise on all ranks alike.
    """
    order: list[int] = []
    found: list[Tensor] = []
    groups = list(micro_batches(sequences, tokens_per_batch))
    for indices in in_rounds(model, groups, lambda: values_of(model, SHORTEST)):
        if indices is not None:
            found.append(values_of(model, [sequences[i] for i in indices]).float())
            order += indices
        after_round()
    result = torch.zeros(len(sequences))
    if found:
        result[order] = torch.cat(found).cpu()
    return collectives.sum_over_ranks(result)


@torch.no_grad()
def policy_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    sequences: Sequences,
    *,
    tokens_per_batch: int,
    temperature: float = 1.0,
    as_reference: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-ratios [N], exact KLs [N], reference log-probs at temperature 1 [N]) of samples from the policy, in nats.

    The log-ratio is sum_t [log pi - log pi_ref] of the sampled tokens, whose mean estimates the sequence KL. The exact
    form sums the KL of the two next-token distributions over time: the same mean, with lower variance.
    `as_reference` is the context in which `reference` is the reference: a policy without its adapters may be. The ranks
    of a process group share the micro-batches, and every rank gets all values.
    """

    def sums_of(batch: Sequences) -> Tensor:
        inner = partial(_kl_sums, policy, reference, batch, temperature, as_reference)
        return with_gathered_weights(policy, partial(with_gathered_weights, reference, inner))

    found: list[Tensor] = []
    order: list[int] = []
    groups = list(micro_batches(sequences, tokens_per_batch))
    for indices in in_rounds(policy, groups, lambda: sums_of(SHORTEST)):
        if indices is not None:
            found.append(sums_of([sequences[i] for i in indices]))
            order += indices
    result = torch.zeros(3, len(sequences))
    if found:
        result[:, order] = torch.cat(found, dim=1).cpu()  # read once, as in `shared_values`
    log_ratio, exact, ref_logps = collectives.sum_over_ranks(result)
    return log_ratio, exact, ref_logps


def _kl_sums(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    sequences: Sequences,
    temperature: float,
    as_reference: Callable[[], AbstractContextManager],
) -> Tensor:
    """[3, B]: log-ratio, exact KL and reference log-prob of each sequence of a micro-batch."""
    layout = lay_out([policy, reference], sequences)
    hidden_p = response_rows(policy, layout)
    with as_reference():
        hidden_r = response_rows(reference, layout)
    rows = max(16, _TILE_BYTES // (4 * vocabulary(policy)))
    sums = torch.zeros(3, len(sequences), device=hidden_p.device)
    tiles = (t.split(rows) for t in (hidden_p, hidden_r, layout.targets, layout.owner))
    for hp, hr, y, owner in zip(*tiles, strict=True):
        logits_r = _logits(reference, hr)  # the head itself: adapters on it are in the rows (see has_plain_head)
        p = F.log_softmax(_logits(policy, hp) / temperature, dim=-1)
        r = F.log_softmax(logits_r / temperature, dim=-1)
        sums[0].index_add_(0, owner, (p - r).gather(1, y[:, None])[:, 0])
        sums[1].index_add_(0, owner, kl(p, r))
        plain = r if temperature == 1.0 else F.log_softmax(logits_r, dim=-1)
        sums[2].index_add_(0, owner, plain.gather(1, y[:, None])[:, 0])
    return sums


def micro_batches(sequences: Sequences, tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices in groups of at most `tokens_per_batch` tokens, one sequence at least; those of a prompt are adjacent.

    Prompts with longer sequences come first, so that a padded batch holds similar lengths.
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
class Part:
    """Sequences that are forwarded together: `ids` [rows, T], and their `tree` where they are packed.

    `counts` [rows * T]: how often each token counts in the routing that is recorded, 0 for padding.
    """

    ids: Tensor
    tree: packed.Tree | None
    counts: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """A micro-batch of B sequences as the model's input, with the places of its response tokens.

    `parts` are forwarded one after the other: there is one, or one for each set of rotary frequencies (`rope`). `at`
    [N]: indices into all parts' flattened ids whose hidden states predict the response tokens `targets` [N]; `owner`
    [N]: the sequence of each; `ends` [B]: indices of the last tokens.
    """

    parts: list[Part]
    at: Tensor
    owner: Tensor
    targets: Tensor
    ends: Tensor
    routed: RoutedTokens | None = None


def lay_out(
    models: Sequence[PreTrainedModel], sequences: Sequences, *, whole: bool = False, routed: RoutedTokens | None = None
) -> Layout:
    """The micro-batch on the models' device: packed where all `models` support it, else padded on the right.

    With `whole` the last tokens are forwarded too: a reward is read from their hidden states. `routed` records how a
    mixture of experts routes the tokens. Raises InputError for a model that is not causal.
    """
    device = next(models[0].parameters()).device
    lengths = [len(ids) for ids, _ in sequences]
    # the frequencies are those of the whole text
    whole = whole or routed is not None or any(rope.switch_of(model) for model in models)
    parts: list[Part] = []
    at: list[Tensor] = [torch.empty(0)] * len(sequences)
    ends = torch.empty(len(sequences), dtype=torch.long)
    offset = 0
    for members in rope.groups(models, lengths):
        part, places, lasts = _part(models, [sequences[i] for i in members], device, whole)
        if routed:
            counts = [routed.counts[i] for i in members]
            part = replace(part, counts=_token_counts(models[0], part, [sequences[i] for i in members], counts))
        sizes = [lengths[i] - sequences[i][1] for i in members]
        for i, rows in zip(members, (places + offset).split(sizes), strict=True):
            gaps = gaps_of(sequences[i])
            at[i] = rows[kept(len(rows), gaps)] if gaps else rows
        ends[members] = lasts + offset
        offset += part.ids.numel()
        parts.append(part)
    owner = torch.tensor([i for i, rows in enumerate(at) for _ in range(len(rows))], dtype=torch.long)
    targets = torch.tensor([t for sequence in sequences for t in _targets(sequence)], dtype=torch.long)
    at_rows, owner, targets, ends = (to_device(each, device) for each in (torch.cat(at), owner, targets, ends))
    return Layout(parts, at_rows, owner, targets, ends, routed)


def _targets(sequence: tuple[Sequence[int], int]) -> Sequence[int]:
    """The ids of a sequence's response tokens."""
    ids, start = sequence
    gaps = gaps_of(sequence)
    return [ids[start + place] for place in kept(len(ids) - start, gaps)] if gaps else ids[start:]


def _token_counts(model: PreTrainedModel, part: Part, sequences: Sequences, counts: list[float]) -> Tensor:
    """[rows * T]: how often each token of a part counts."""
    rows, width = part.ids.shape
    if part.tree is None:
        found = [[c] * len(s) + [0.0] * (width - len(s)) for c, (s, _) in zip(counts, sequences, strict=True)]
        return torch.tensor(found).flatten()
    row = packed.token_counts(sequences, model.config.get_text_config().hidden_size, counts)
    return torch.tensor(row + [0.0] * (width - len(row)))


def _part(
    models: Sequence[PreTrainedModel], sequences: Sequences, device: torch.device, whole: bool
) -> tuple[Part, Tensor, Tensor]:
    """(part, at [N], ends [B]) of sequences that are forwarded together."""
    longest = max(len(ids) for ids, _ in sequences)
    if all(can_pack(model, longest) for model in models):
        width = models[0].config.get_text_config().hidden_size
        ids, tree, at, ends = packed.pack(sequences, width, device, whole=whole)
        return Part(to_device(ids, device), tree), at, ends
    for model in models:
        require_causal(model)
    ids, at, ends = packed.pad(sequences, _padding(models[0]))
    return Part(to_device(ids, device), None), at, ends


def _padding(model: PreTrainedModel) -> int:
    """An id to pad with, which the causal mask hides: the configuration's where it is one, else 0."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < vocabulary(model) else 0


def trunk_states(model: PreTrainedModel, layout: Layout) -> Tensor:
    """Last hidden states [tokens of all parts, d] of a model's trunk, or of a model that is a trunk."""
    trunk = trunk_of(model)
    return _joined([_forward(trunk, part, layout.routed).last_hidden_state for part in layout.parts])


def response_rows(model: PreTrainedModel, layout: Layout, states: Tensor | None = None) -> Tensor:
    """Hidden rows [N, d] (or logits [N, V], see has_plain_head) that predict the response tokens.

    `states` are the trunk's last hidden states, where the caller has them.
    """
    if not has_plain_head(model):
        return _joined([_forward(model, part, layout.routed).logits for part in layout.parts]).index_select(
            0, layout.at
        )
    states = trunk_states(model, layout) if states is None else states
    return states.index_select(0, layout.at)  # deterministic gradient, unlike states[at]


def _forward(model: PreTrainedModel, part: Part, routed: RoutedTokens | None) -> Any:
    if rope.switch_of(model):
        rope.reset(model)
    tree = {} if part.tree is None else packed.arguments(part.tree)
    if routed is None:
        return model(input_ids=part.ids, use_cache=False, **tree)
    assert part.counts is not None
    with recorded(model, routed, part.counts):
        return model(input_ids=part.ids, use_cache=False, **tree)


def _joined(parts: list[Tensor]) -> Tensor:
    """[tokens of all parts, d] of the parts' [rows, T, d]."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """[N, V] float32 logits of `response_rows`."""
    return next_logits(model, rows).float()
