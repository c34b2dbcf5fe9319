"""Points of the reward-KL frontier (2305.18290, section 6.1): reward, KL and fluency of a policy's completions."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import log
from ..data.answers import row_tokens
from ..data.stored import stored_completion
from ..models.load import Loaded
from ..models.logprobs import Sequences, policy_kl, response_logps
from .completions import PromptSet, complete, sequences_of
from .generate import sampling_of
from .options import EvaluationOptions
from .scorer_text import completion_of
from .scorers import Scorer
from .text_statistics import distinct_n, mean_se, repetition_loop

NO_KL: dict[str, float | None] = {"kl": None, "kl_se": None, "kl_exact": None, "kl_exact_se": None}


class NamedModel(NamedTuple):
    """A language model with its tokenizer and the name by which rows mention it."""

    name: str
    loaded: Loaded


class Reference(NamedTuple):
    """The model of the KL, and the context in which it is the reference: a policy without its adapters may be one."""

    model: PreTrainedModel
    as_reference: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class PolicyEvaluation:
    """How policies are evaluated: `n` completions of each prompt, scored, and their KL to a reference.

    `lm` is a further language model for the perplexity.
    """

    scorer: Scorer
    options: EvaluationOptions
    seed: int
    n: int = 1
    lm: NamedModel | None = None

    @torch.no_grad()
    def measure(
        self,
        policy: Loaded,
        reference: Reference | None,
        prompts: PromptSet | list[dict],
        meter: log.Progress | None = None,
    ) -> tuple[dict[str, Any], list[dict]]:
        """(metrics of an evaluation row, completions with their scores) of a policy; its mode is restored afterwards.

        In place of the prompts there may be their completions, as rows: nothing is sampled then.

        KLs are those of the sampled distributions: both models' logits are divided by the temperature. At temperature 0
        and with top-p or top-k there is no such KL, and it is None. The ranks of a process group share the work, and
        every rank gets the result.
        """
        was_training = policy.model.training
        policy.model.eval()
        if isinstance(prompts, PromptSet):
            sampling = sampling_of(self.options, self.options.temperature, self.seed)
            completions = complete(policy, prompts, self.n, sampling, self.options.generation_batch_size, meter)
        else:
            completions = prompts
        scores = self.scorer.score(completions).values
        completions = [c | {"score": s} for c, s in zip(completions, scores, strict=True)]
        sequences = sequences_of(completions)
        metrics = statistics(completions, [len(ids) - start for ids, start in sequences], scores)
        if reference is not None:
            metrics |= self._against(reference, policy.model, sequences, [c["prompt_id"] for c in completions])
        else:
            metrics |= NO_KL
        if self.lm is not None:
            metrics |= perplexity_of_lm(self.lm, completions, self.options.tokens_per_batch)
        policy.model.train(was_training)
        return metrics, completions

    def _against(
        self,
        reference: Reference,
        model: PreTrainedModel,
        sequences: list[tuple[list[int], int]],
        prompt_of: list[str],
    ) -> dict[str, Any]:
        """KLs to the reference in nats with standard errors over prompts, and the perplexity under the reference."""
        options = self.options
        unrestricted = options.temperature > 0 and options.top_p == 1.0 and options.top_k == 0
        log_ratio, exact, ref_logps = policy_kl(
            model,
            reference.model,
            sequences,
            temperature=options.temperature if unrestricted else 1.0,
            tokens_per_batch=options.tokens_per_batch,
            as_reference=reference.as_reference,
        )
        return kl_metrics(log_ratio, exact, ref_logps, sequences, prompt_of, plain=unrestricted)


def kl_metrics(
    log_ratio: Tensor, exact: Tensor, ref_logps: Tensor, sequences: Sequences, prompt_of: Sequence[str], *, plain: bool
) -> dict[str, Any]:
    """KLs in nats with standard errors over prompts, and the perplexity under the reference, from `policy_kl` [N].

    None for the KLs of samples that are not `plain`: greedy, or of a restricted distribution.
    """
    metrics: dict[str, Any] = {}
    for name, values in (("kl", log_ratio), ("kl_exact", exact)):
        mean, se = mean_se(values.tolist(), prompt_of)
        metrics |= {name: mean if plain else None, f"{name}_se": se if plain else None}
    tokens = sum(len(ids) - start for ids, start in sequences)
    return metrics | {"perplexity_ref": math.exp(-ref_logps.double().sum().item() / tokens)}


def statistics(completions: Sequence[dict], lengths: Sequence[int], scores: Sequence[float]) -> dict[str, Any]:
    """Reward and lengths (tokens) with standard errors over prompts, share that ended, repetitiveness."""
    by_prompt = [c["prompt_id"] for c in completions]
    texts = [completion_of(c) for c in completions]
    reward, reward_se = mean_se(scores, by_prompt)
    length, length_se = mean_se([float(n) for n in lengths], by_prompt)
    tails: list[Any] = [without_end(c) or completion_of(c).split() for c in completions]
    row = {"reward": reward, "reward_se": reward_se, "length": length, "length_se": length_se, "n": len(completions)}
    row["ended"] = sum(c.get("finish") == "stop" for c in completions) / len(completions)
    row |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    return row | {"repetition": sum(map(repetition_loop, tails)) / len(tails)}


def without_end(row: dict) -> list[int]:
    """The ids that a completion row stores for its text, without the end token; empty where it stores none."""
    found = stored_completion(row, "completion", row.get("tokenizer", ""))
    ids = found[1] if found else []
    return ids[:-1] if row.get("finish") == "stop" else ids


def length_of(row: dict) -> int:
    """Tokens of a completion row, the end token counted; its words where the row has no ids."""
    return len(without_end(row) or completion_of(row).split()) + (row.get("finish") == "stop")


def perplexity_of_lm(lm: NamedModel, completions: Sequence[dict], tokens_per_batch: int) -> dict[str, Any]:
    """The perplexity under a named language model, as an evaluation row has it."""
    return {"perplexity_lm": perplexity(lm.loaded, completions, tokens_per_batch), "lm": lm.name}


def perplexity(lm: Loaded, completions: Sequence[dict], tokens_per_batch: int) -> float:
    """Perplexity per token of the completions, given their prompts, under a language model with its tokenizer."""
    sequences = _sequences_of(lm, completions)
    logps = response_logps(lm.model, sequences, tokens_per_batch=tokens_per_batch)
    tokens = sum(len(ids) - start for ids, start in sequences)
    return math.exp(-logps.double().sum().item() / tokens)


def tokens_of(lm: Loaded, completions: Sequence[dict]) -> int:
    """How many tokens the perplexity of the completions is taken over."""
    return sum(len(ids) - start for ids, start in _sequences_of(lm, completions))


def _sequences_of(lm: Loaded, completions: Sequence[dict]) -> list[tuple[list[int], int]]:
    """(ids, start of the completion) of completions, by a language model's tokenizer."""
    encoded = [row_tokens(lm.codec, row, finished=row.get("finish") == "stop") for row in completions]
    return [(prompt + ids, len(prompt)) for prompt, ids in encoded if prompt and ids]
