"""Sample completions from a causal language model, one batch of prompts at a time.

How rows share a batch is `decoding`'s. A row's random numbers do not depend on the others (`token_sampling`), but
rounding depends on what shares a batch: equal batches give equal bytes, so a resumed or sharded command splits its rows
only between batches.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..models.load import context_length
from ..models.perturbation import next_logits, perturbation_of
from ..models.probes import has_plain_head
from ..outputs.shards import slices
from ..runtime.devices import to_device
from ..runtime.fsdp_root import is_sharded
from .decoding import open_decoding
from .options import SamplingOptions
from .token_sampling import sample_token, sample_token_from_states, uniforms


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Temperature 0 is greedy, top_p 1 and top_k 0 exclude nothing, and a text ends before a stop string. `seed` is the
    seed of the random numbers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    seed: int = 0


class PromptTokens(NamedTuple):
    """A prompt's token ids, and the ids that end an answer; `key`, its prompt_id, seeds the random numbers.

    `lead`: blanks with which an answer's tokens begin that are not part of its text.
    """

    key: str
    ids: list[int]
    stops: frozenset[int]
    lead: str = ""


@dataclass
class Completion:
    """A sampled text, its token ids, and how it ended: `stop` (end token or stop string) or `length`.

    `ids` include the end token that was sampled; `text` does not. `logp`: the sum of their log-probs as an engine other
    than this package's gives them. `alternatives`: for each id the log-probs, by id, of the most probable tokens in its
    place and of itself, at the temperature that was sampled (1 for greedy); None where they were not asked for.
    """

    ids: list[int]
    text: str
    finish: str
    logp: float | None = None
    alternatives: list[dict[int, float]] | None = None


def sampling_of(options: SamplingOptions, temperature: float, seed: int, stop: tuple[str, ...] = ()) -> Sampling:
    """How a command's options say to sample, at a temperature."""
    return Sampling(
        temperature=temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        stop=stop,
        seed=seed,
    )


def batch_slices(n_prompts: int, n_per_prompt: int, generation_batch_size: int = 256) -> list[slice]:
    """Slices of consecutive prompts with at most `generation_batch_size` completions each, but at least one prompt."""
    return slices(n_prompts, max(1, generation_batch_size // n_per_prompt))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptTokens],
    ks: list[int],
    sampling: Sampling,
) -> list[list[Completion]]:
    """Completions number `ks` of every prompt, as one batch: result[i][j] is prompt i's completion ks[j].

    The length is bounded by `max_new_tokens`, the end token counted, and by the end of the context. The model is
    expected in eval mode.
    Raises InputError for an empty prompt and one that leaves no room in the context.
    """
    if not prompts or not ks:
        return [[] for _ in prompts]
    # Weights that FSDP gathers in inference mode could not be trained afterwards.
    with torch.no_grad() if is_sharded(model) else torch.inference_mode():
        return _generate(model, tokenizer, prompts, ks, sampling)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptTokens],
    ks: list[int],
    sampling: Sampling,
) -> list[list[Completion]]:
    limits = limits_of(prompts, context_length(model), sampling.max_new_tokens)
    rows = [(i, k) for i in range(len(prompts)) for k in ks]
    steps = max(limits)
    numbers = np.stack([uniforms(sampling.seed, prompts[i].key, k, steps) for i, k in rows])
    tokens: list[list[int]] = [[] for _ in rows]
    finish = ["length"] * len(rows)

    head = _fused_head(model, sampling)
    batch = open_decoding(model, [prompt.ids for prompt in prompts], [i for i, _ in rows], steps)
    states = batch.prefill()
    active = set(range(len(rows)))
    for step in range(steps):
        u = torch.from_numpy(numbers[batch.rows, step])
        sampled = _next_tokens(model, states, u, sampling, head).tolist()
        for row, token in zip(batch.rows, sampled, strict=True):
            if row not in active:
                continue
            tokens[row].append(token)
            if _stops(tokenizer, prompts[rows[row][0]], tokens[row], sampling.stop):
                finish[row] = "stop"
                active.remove(row)
            elif len(tokens[row]) == limits[rows[row][0]]:
                active.remove(row)
        if not active:
            break
        states = batch.step(sampled, active)

    completions = iter(
        [
            as_completion(tokenizer, prompts[i], ids, how, sampling.stop)
            for (i, _), ids, how in zip(rows, tokens, finish, strict=True)
        ]
    )
    return [[next(completions) for _ in ks] for _ in prompts]


def _fused_head(model: PreTrainedModel, sampling: Sampling) -> torch.Tensor | None:
    """The head's weight in the compute dtype where its product and the draw can be fused, else None."""
    output = model.get_output_embeddings()
    full = sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p == 1.0
    if not (full and has_plain_head(model) and output.bias is None and output.weight.device.type == "cpu"):
        return None
    if perturbation_of(model):
        return None
    return output.weight.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else output.weight


def _next_tokens(
    model: PreTrainedModel,
    states: torch.Tensor,
    u: torch.Tensor,
    sampling: Sampling,
    fused_head: torch.Tensor | None,
) -> torch.Tensor:
    """[rows] tokens drawn from the last hidden states [rows, d] (or logits, see probes.has_plain_head)."""
    if fused_head is not None:
        return sample_token_from_states(states.to(fused_head.dtype), fused_head, u, sampling.temperature)
    logits = next_logits(model, states)
    u = to_device(u, logits.device)
    return sample_token(logits, u, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)


def limits_of(prompts: list[PromptTokens], context: int | None, max_new_tokens: int) -> list[int]:
    """The most new tokens of each prompt. Raises InputError for an empty prompt and one that fills the context."""
    limits = []
    for key, prompt, *_ in prompts:
        if not prompt:
            raise InputError(
                f"prompt {key}: it has no tokens", "a model needs at least one token to continue (a BOS is enough)"
            )
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
        if room < 1:
            raise InputError(
                f"prompt {key}: its {len(prompt)} tokens leave no room in the model's context of {context}",
                hint="shorten the prompt",
            )
        limits.append(room)
    return limits


def ends_at(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptTokens, ids: list[int], stop: tuple[str, ...]
) -> int | None:
    """How many sampled ids there are when sampling stops at an end token or a stop string; None where it goes on."""
    if not stop:
        return next((n for n, id in enumerate(ids, start=1) if id in prompt.stops), None)
    return next((n for n in range(1, len(ids) + 1) if _stops(tokenizer, prompt, ids[:n], stop)), None)


def _stops(tokenizer: PreTrainedTokenizerBase, prompt: PromptTokens, ids: list[int], stop: tuple[str, ...]) -> bool:
    """Whether sampling stops after the last of the ids."""
    if ids[-1] in prompt.stops:
        return True
    return bool(stop) and _first_stop(tokenizer.decode(ids[-_tail_length(stop) :]), stop) is not None


def _tail_length(stop: tuple[str, ...]) -> int:
    """How many last tokens to search for a stop string.

    A token holds at least one byte; the margin covers bytes of the first tokens that precede the string.
    """
    return max(len(s.encode()) for s in stop) + 8


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found, default=None)


def as_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptTokens, ids: list[int], finish: str, stop: tuple[str, ...]
) -> Completion:
    """Token ids to text, cut before the first stop string, with the longest run of ids that fits into that text."""
    end = ids[-1:] if ids[-1:] and ids[-1] in prompt.stops else []
    ids = ids[: len(ids) - len(end)]
    text = _text_after(tokenizer, prompt.ids, ids)
    cut = _first_stop(text, stop)
    if cut is not None:
        text, end = text[:cut], []
        while ids and len(_text_after(tokenizer, prompt.ids, ids)) > cut:
            ids = ids[:-1]
    return Completion(ids + end, text.removeprefix(prompt.lead), finish)


def _text_after(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int]) -> str:
    """The text that `ids` add to the prompt. Decoded alone, some tokenizers would drop a leading space."""
    before, joined = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return joined[len(before) :] if joined.startswith(before) else tokenizer.decode(ids)
