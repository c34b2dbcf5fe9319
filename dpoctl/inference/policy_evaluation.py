"""Points of the reward-KL frontier: a model's completions of test prompts, their reward, KL to the reference, fluency."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..data.encode import truncate
from ..data.tokens import fingerprint
from ..errors import InputError
from ..models.logprobs import policy_kl, response_logps
from .generate import Sampling, batch_slices, generate
from .text_statistics import distinct_n, mean_se, repetition_loop


def sampling_of(config: Any, stop: tuple[str, ...] = (), temperature: float | None = None) -> Sampling:
    return Sampling(
        temperature=config.temperature if temperature is None else temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        stop=stop,
    )


def prompt_ids(
    rows: Sequence[dict], tokenizer, context: int | None, path: str, lines: Sequence[int], longest: int | None = None
) -> list[list[int]]:
    """Token ids of prompt rows, each with room for an answer within the model's context.

    Ids in a row are taken where they are this tokenizer's. Prompts over `longest` keep BOS and end. Raises InputError
    with file and line for a prompt that leaves no room.
    """
    from ..data.tokens import bos_length, encode_prompts

    own = fingerprint(tokenizer)
    fits = [row.get("prompt_ids") if row.get("tokenizer") == own else None for row in rows]
    missing = [i for i, ids in enumerate(fits) if not ids]
    encoded = encode_prompts(tokenizer, [rows[i]["prompt"] for i in missing], lambda j: f"{path}:{lines[missing[j]]}")
    for i, ids in zip(missing, encoded, strict=True):
        fits[i] = ids
    fits = [truncate(ids, [], None, longest, bos_length(tokenizer))[0] for ids in fits]
    for ids, line in zip(fits, lines, strict=True):
        if context is not None and len(ids) >= context:
            raise InputError(
                f"{path}:{line}: prompt: {len(ids)} tokens leave no room in the model's context of {context}",
                hint="sample and the training commands keep the end of prompts longer than --max-prompt-length",
            )
    return fits


def complete(
    model, tokenizer, rows: Sequence[dict], ids: list[list[int]], n: int, config, seed: int, meter=None
) -> list[dict]:
    """`n` completions of every prompt as completion rows with their token ids, wave by wave."""
    done: list[dict] = []
    for batch in batch_slices(len(rows), n, config.generation_batch_size):
        keys = [row["prompt_id"] for row in rows[batch]]
        drawn = generate(model, tokenizer, ids[batch], keys, list(range(n)), sampling_of(config), seed)
        done.extend(completion_rows(tokenizer, rows[batch], ids[batch], drawn))
        if meter:
            meter.advance(sum(len(d) for d in drawn))
    return done


def completion_rows(tokenizer, rows: Sequence[dict], ids: list[list[int]], drawn) -> list[dict]:
    """Completion rows (DESIGN: completions), unknown fields of the prompt carried along."""
    own = fingerprint(tokenizer)
    result = []
    for row, prompt, completions in zip(rows, ids, drawn, strict=True):
        carried = {k: v for k, v in row.items() if k not in ("prompt_ids", "tokenizer")}
        for k, c in enumerate(completions):
            fresh = carried | {"completion": c.text, "k": k, "finish": c.finish}
            if not isinstance(row["prompt"], str) or tokenizer.decode(prompt + c.ids) == row["prompt"] + c.text:
                fresh |= {"prompt_ids": prompt, "completion_ids": c.ids, "tokenizer": own}
            result.append(fresh)
    return result


def sequences_of(completions: Sequence[dict], tokenizer) -> list[tuple[list[int], int]]:
    """(ids, start) of sampled completion rows, EOS appended where the sample ended by itself."""
    eos = [tokenizer.eos_token_id]
    pairs = [(c["prompt_ids"], c["completion_ids"] + (eos if c["finish"] == "stop" else [])) for c in completions]
    return [(p + c, len(p)) for p, c in pairs]


def statistics(completions: Sequence[dict], lengths: Sequence[int], scores: Sequence[float]) -> dict[str, Any]:
    """Reward, lengths in tokens, share that ended, distinct-n and repetition loops, with standard errors over prompts."""
    by_prompt = [c["prompt_id"] for c in completions]
    texts = [c["completion"] for c in completions]
    reward, reward_se = mean_se(scores, by_prompt)
    length, length_se = mean_se([float(n) for n in lengths], by_prompt)
    tails = [c.get("completion_ids") or c["completion"].split() for c in completions]
    row = {"reward": reward, "reward_se": reward_se, "length": length, "length_se": length_se, "n": len(completions)}
    row["ended"] = sum(c.get("finish") == "stop" for c in completions) / len(completions)
    row |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    return row | {"repetition": sum(map(repetition_loop, tails)) / len(tails)}


@torch.no_grad()
def evaluate_policy(
    policy, reference, tokenizer, rows, ids, scorer, config, *, n: int, seed: int, lm=None, meter=None
) -> tuple[dict[str, Any], list[dict]]:
    """(the figures of an evaluation row, the completions with their scores) of a policy on prompt rows.

    KLs are those of the distributions that were sampled: both models' logits are divided by the temperature; at
    temperature 0 or with top-p or top-k there is no such KL, and it is null. `lm` is (model, tokenizer, name).
    """
    was_training = policy.training
    policy.eval()
    completions = complete(policy, tokenizer, rows, ids, n, config, seed, meter)
    scores = scorer.score(completions).values
    completions = [c | {"score": s} for c, s in zip(completions, scores, strict=True)]
    with_ids = [c for c in completions if "completion_ids" in c]
    sequences = sequences_of(with_ids, tokenizer)
    lengths = [len(s) - start for s, start in sequences]
    metrics = statistics(completions, lengths or [len(c["completion"].split()) for c in completions], scores)
    plain = config.temperature > 0 and config.top_p == 1.0 and config.top_k == 0
    by_prompt = [c["prompt_id"] for c in with_ids]
    if reference is not None and sequences:
        temperature = config.temperature if plain else 1.0
        log_ratio, exact, ref_logps = policy_kl(
            policy, reference, sequences, temperature=temperature, tokens_per_batch=config.tokens_per_batch
        )
        for name, values in (("kl", log_ratio), ("kl_exact", exact)):
            mean, se = mean_se(values.tolist(), by_prompt)
            metrics |= {name: mean if plain else None, f"{name}_se": se if plain else None}
        metrics["perplexity_ref"] = math.exp(-ref_logps.double().sum().item() / sum(lengths))
    else:
        metrics |= {"kl": None, "kl_se": None, "kl_exact": None, "kl_exact_se": None}
    if lm is not None:
        metrics |= perplexity_under(*lm, completions, config.tokens_per_batch)
    policy.train(was_training)
    return metrics, completions


def perplexity_under(model, tokenizer, name: str, completions, tokens_per_batch: int) -> dict[str, Any]:
    """Perplexity per token of the completions, given their prompts, under a named language model with its tokenizer."""
    from ..data.tokens import encode_completion, encode_prompt

    sequences = []
    for c in completions:
        prompt = encode_prompt(tokenizer, c["prompt"])
        answer = encode_completion(tokenizer, c["prompt"], c["completion"], prompt, finished=c.get("finish") == "stop")
        if prompt and answer:
            sequences.append((prompt + answer, len(prompt)))
    logps = response_logps(model, sequences, tokens_per_batch=tokens_per_batch)
    tokens = sum(len(ids) - start for ids, start in sequences)
    return {"perplexity_lm": math.exp(-logps.double().sum().item() / tokens), "lm": name}
