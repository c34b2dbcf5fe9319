"""What a model's code does, found out by running the model once: can it be packed, and what computes its logits.

Architectures differ where no configuration says so. Each question is answered by comparing two ways of computing the
same numbers; where they differ, the slower way is used. A window or a chunk shows only in texts that are longer, so
texts for a probe are longer than those spans of the configuration that the texts of the run exceed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .. import log
from ..errors import InputError
from . import attention_kernel, packed
from .attention_kernel import TOLERANCE
from .precision import full_precision

# Integers of such names bound what a token attends to, or how many tokens are computed together.
_SPANS, _NO_SPANS = ("window", "chunk", "block", "local_attention", "span"), ("layers", "pattern", "multiple")
_SHORTEST = 9
_MARGIN = 7  # tokens beyond the longest span
_LARGE = 1e3  # a logit's size at which any soft cap shows


def trunk_of(model: PreTrainedModel) -> Any:
    """The part of a model that gives hidden states; the model itself where it has none, or is one."""
    trunk = model.base_model
    if trunk is not model:
        return trunk
    return _decoder_of(model)


def _decoder_of(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model if decoder is None else decoder


def vocabulary(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().num_embeddings


def probe_length(model: PreTrainedModel, longest: int) -> int:
    """Tokens of a probe's longest text, for a model that will see texts of up to `longest` tokens."""
    spans = [span for span in _spans(model.config.get_text_config()) if span < longest]
    return max(_SHORTEST, min(max(spans, default=0) + _MARGIN, longest))


def _spans(config: PretrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if any(part in name for part in _SPANS) and not any(part in name for part in _NO_SPANS):
            for each in value if isinstance(value, list | tuple) else [value]:
                if isinstance(each, int) and not isinstance(each, bool) and each > 0:
                    yield each


def probe_ids(model: PreTrainedModel, length: int, seed: int = 0) -> list[int]:
    """Random token ids, the same for equal arguments."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary(model), (length,), generator=draw).tolist()


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    if found.shape != expected.shape or not expected.isfinite().all():
        return False
    limit = TOLERANCE.get(expected.dtype, 1e-3) * expected.abs().max()
    return bool((found - expected).abs().max() <= limit)


# --- packing ---------------------------------------------------------------------------------------------------------


def can_pack(model: PreTrainedModel, longest: int) -> bool:
    """Whether a packed row gives a padded batch's hidden states, for texts of up to `longest` tokens; logged if not.

    Tested once for each length of the probe; where a GPU's kernel attends, it is tested too, in the precision in use
    and, where gradients are, with its backward pass. Sets the model's attention to `packed.attend`, which calls
    transformers' SDPA attention where there is no tree, or back to its own.
    """
    assumed = getattr(model, "_dpoctl_can_pack", None)
    if assumed is not None:
        return assumed
    device = next(model.parameters()).device
    packs = has_packed_numbers(model, longest)
    if packs and packed.uses_flex(device):
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else None
        packs = has_attention_kernel(model, longest, device, dtype, learns=torch.is_grad_enabled())
    wanted = packed.NAME if packs else model._dpoctl_attention
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)
    return packs


@contextmanager
def without_packing(model: PreTrainedModel) -> Iterator[None]:
    """Batches of the model are padded."""
    before = model.__dict__.get("_dpoctl_can_pack")
    model._dpoctl_can_pack = False
    try:
        yield
    finally:
        if before is None:
            del model._dpoctl_can_pack
        else:
            model._dpoctl_can_pack = before


def has_packed_numbers(model: PreTrainedModel, longest: int) -> bool:
    """Whether the model's code computes a packed row as it computes a padded batch; logged if not."""
    if not hasattr(model, "_dpoctl_packs"):
        model._dpoctl_packs, model._dpoctl_attention = {}, model.config._attn_implementation
        model._dpoctl_calls = {}
    known: dict[int, bool] = model._dpoctl_packs
    length = probe_length(model, longest)
    if length not in known:
        known[length], model._dpoctl_calls[length] = _try_packing(model, length)
        if not known[length]:
            log.say(f"{type(model).__name__}: batches are padded, because packing changes its hidden states")
    return known[length]


def has_attention_kernel(
    model: PreTrainedModel, longest: int, device: torch.device, dtype: torch.dtype | None, *, learns: bool
) -> bool:
    """Whether the device's kernel attends as `has_packed_numbers` found the model to; logged if not.

    `dtype`: of the run's autocast (None: that of the weights); `learns`: its backward pass is needed.
    """
    for call in sorted(model._dpoctl_calls[probe_length(model, longest)], key=repr):
        fault = attention_kernel.fault_of(attention_kernel.tried(call, longest, dtype), device, learns)
        if fault:
            said: set[str] = model.__dict__.setdefault("_dpoctl_said_padded", set())
            if fault not in said:
                said.add(fault)
                log.warn(f"{type(model).__name__}: batches are padded, which is slower: {fault}")
            return False
    return True


def assume(model: PreTrainedModel, *, packs: bool, plain_head: bool) -> None:
    """Answer all questions for a model that cannot be run, or whose weights another rank has."""
    if packs:
        model.set_attn_implementation(packed.NAME)
    model._dpoctl_can_pack, model._dpoctl_plain_head, model._dpoctl_causal = packs, plain_head, True


@torch.no_grad()
def _try_packing(model: PreTrainedModel, length: int) -> tuple[bool, set[packed.Call]]:
    """(whether packing keeps the hidden states, what attention was called with)."""
    trunk, device = trunk_of(model), next(model.parameters()).device
    if trunk is model and model.get_output_embeddings() is not None:
        return False, set()  # it gives no hidden states
    start = length // 2
    first, second, third = (probe_ids(model, n, seed) for n, seed in ((length, 0), (length, 1), (start, 2)))
    # two completions that share a prompt, and a text alone
    sequences = [(first, start), (first[:start] + second[start:-1], start), (third, 2)]
    calls: set[packed.Call] = set()
    with full_precision(model, device):
        model.set_attn_implementation(model._dpoctl_attention)
        ids, at, ends = packed.pad(sequences, 0)
        expected = trunk(input_ids=ids.to(device), use_cache=False).last_hidden_state.flatten(0, 1)
        expected = expected[torch.cat([at, ends])]
        try:
            model.set_attn_implementation(packed.NAME)
            row, tree, at, ends = packed.pack(sequences, 1 << 20, device, whole=True)
            tree.calls = calls
            states = trunk(input_ids=row.to(device), use_cache=False, **packed.arguments(tree))
            return agree(states.last_hidden_state.flatten(0, 1)[torch.cat([at, ends])], expected), calls
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as e:
            log.detail(f"{type(model).__name__} cannot take a packed row: {type(e).__name__}: {e}")
            return False, calls


# --- causality -------------------------------------------------------------------------------------------------------


def require_causal(model: PreTrainedModel) -> None:
    """Raise InputError where tokens change what comes before them; tried once per model.

    `transformers` lists such models (XLNet, CPM-Ant) among its causal ones. One forward pass does not give the
    log-probs of their next tokens, and padding on the right would change their numbers.
    """
    if not hasattr(model, "_dpoctl_causal"):
        model._dpoctl_causal = any(_is_causal(model, seed) for seed in range(3))  # experts may be chosen at a tie
    if not model._dpoctl_causal:
        raise InputError(
            f"{type(model).__name__}: a token's hidden state depends on the tokens after it, so that one pass over a "
            "text does not give the log-probs of its tokens",
            hint="give a model that reads from left to right",
        )


@torch.no_grad()
def _is_causal(model: PreTrainedModel, seed: int) -> bool:
    trunk, device = trunk_of(model), next(model.parameters()).device
    ids = torch.tensor([probe_ids(model, 2 * _SHORTEST, seed)], device=device)
    with full_precision(model, device):
        outputs = [trunk(input_ids=text, use_cache=False) for text in (ids[:, :_SHORTEST], ids)]
    alone, before = (getattr(o, "last_hidden_state", None) for o in outputs)
    if alone is None or before is None:
        alone, before = (o.logits for o in outputs)
    return agree(before[:, :_SHORTEST], alone)


# --- the head --------------------------------------------------------------------------------------------------------


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the output embedding of the last hidden state and nothing else; tested once per model.

    Some architectures scale or cap their logits after the head: for them the logits come from the model's forward.
    """
    known = getattr(model, "_dpoctl_plain_head", None)
    if known is None:
        known = model._dpoctl_plain_head = _try_plain_head(model)
    return known


@torch.no_grad()
def _try_plain_head(model: PreTrainedModel) -> bool:
    output, trunk = model.get_output_embeddings(), trunk_of(model)
    if output is None or trunk is model or not _is_linear(output):
        return False
    device = next(model.parameters()).device
    ids = torch.tensor([probe_ids(model, _SHORTEST)], device=device)
    with full_precision(model, device):
        states = trunk(input_ids=ids, use_cache=False).last_hidden_state
        size = output(states).float().abs().max().clamp(min=1e-6)
        # Once with the hidden states as they are, once so large that a soft cap changes the logits.
        return all(_is_plain(model, trunk, output, ids, states * factor) for factor in (1.0, float(_LARGE / size)))


def _is_linear(output: Any) -> bool:
    """Whether an output embedding is the product with its weight: a quantised one, or one with an adapter, is not."""
    weight = getattr(output, "weight", None)
    if weight is None or weight.dtype not in TOLERANCE or hasattr(output, "base_layer"):
        return False
    if type(output).forward is nn.Linear.forward:
        return True
    rows = torch.eye(1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    return agree(output(rows), torch.nn.functional.linear(rows, weight, getattr(output, "bias", None)))


def _is_plain(model: PreTrainedModel, trunk: nn.Module, output: Any, ids: Tensor, states: Tensor) -> bool:
    """Whether the model's logits are `output(states)`, where its trunk is made to return `states`."""
    replaced = []

    def replace(module: nn.Module, args: Any, result: Any) -> Any:
        result["last_hidden_state"] = states
        replaced.append(module)
        return result

    inner = _decoder_of(trunk)  # what OPT's forward calls
    hooks = [module.register_forward_hook(replace) for module in {trunk, inner}]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    found = output(states)
    return bool(replaced) and agree(logits.to(found.dtype), found)
