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
from ..data.gaps import sequence_of, size
from ..data.stored import stored_completion
from ..models.load import Loaded
from ..models.logprobs import Sequences, policy_kl, response_logps
from .completions import PromptSet, complete, sequences_of
from .generate import sampling_of
from .options import EvaluationOptions, GenerationOptions
from .scorer_text import completion_of
from .scorers import Scorer
from .text_statistics import distinct_n, mean_se, repetition_loop

_ALLOWED, _LEAST, _ENOUGH = 5.0, 0.01, 8  # standard errors, nats, and prompts from which chance is ruled out
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
        self, policy: Loaded, reference: Reference | None, prompts: PromptSet, meter: log.Progress | None = None
    ) -> tuple[dict[str, Any], list[dict]]:
        """(metrics of an evaluation row, completions with their scores) of a policy; its mode is restored afterwards.

        KLs are those of the sampled distributions: both models' logits are divided by the temperature. At temperature 0
        and with top-p or top-k there is no such KL, and it is None. The ranks of a process group share the work, and
        every rank gets the result.
        """
        was_training = policy.model.training
        policy.model.eval()
        sampling = sampling_of(self.options, self.options.temperature, self.seed)
        completions = complete(policy, prompts, self.n, sampling, self.options.generation_batch_size, meter)
        found = self.measure_samples(policy, reference, completions, kl_temperature(self.options))
        policy.model.train(was_training)
        return found

    @torch.no_grad()
    def measure_samples(
        self,
        policy: Loaded,
        reference: Reference | None,
        rows: list[dict],
        temperature: float | None,
        source: str = "",
    ) -> tuple[dict[str, Any], list[dict]]:
        """The same from a policy's completions, by the ids of their rows; nothing is sampled.

        `temperature` is that of plain samples, None for others, which have no KL. With `source`, the name of samples
        that were drawn elsewhere, it warns where they do not look like the policy's.
        """
        scores = self.scorer.score(rows).values
        completions = [c | {"score": s} for c, s in zip(rows, scores, strict=True)]
        sequences = sequences_of(completions)
        metrics = statistics(completions, [len(ids) - start for ids, start in sequences], scores)
        if reference is not None:
            by_prompt = [c["prompt_id"] for c in completions]
            values = self._against(reference, policy.model, sequences, temperature)
            metrics |= _kl_metrics(values, sequences, by_prompt, plain=temperature is not None)
            if source and temperature is not None:
                _warn_of_another_policy(source, values[0] - values[1], by_prompt, temperature)
        else:
            metrics |= NO_KL
        if self.lm is not None:
            metrics |= perplexity_of_lm(self.lm, completions, self.options.tokens_per_batch)
        return metrics, completions

    def _against(
        self, reference: Reference, model: PreTrainedModel, sequences: Sequences, temperature: float | None
    ) -> Tensor:
        """[3, N]: log-ratio, exact KL and reference log-prob of each sequence, as `policy_kl` has them."""
        values = torch.zeros(3, len(sequences))
        some = [i for i, (ids, start) in enumerate(sequences) if len(ids) > start]  # of no token all are 0
        values[:, some] = torch.stack(
            policy_kl(
                model,
                reference.model,
                [sequences[i] for i in some],
                temperature=1.0 if temperature is None else temperature,
                tokens_per_batch=self.options.tokens_per_batch,
                as_reference=reference.as_reference,
            )
        )
        return values


def kl_temperature(options: GenerationOptions) -> float | None:
    """The temperature of plain samples; None with greedy or restricted sampling, which has no KL."""
    plain = options.temperature > 0 and options.top_p == 1.0 and options.top_k == 0
    return options.temperature if plain else None


def _kl_metrics(values: Tensor, sequences: Sequences, by_prompt: Sequence[str], *, plain: bool) -> dict[str, Any]:
    """KLs in nats with standard errors over prompts, and the perplexity under the reference, from `_against` [3, N].

    None for the KLs of samples that are not `plain`: greedy, or of a restricted distribution.
    """
    metrics: dict[str, Any] = {}
    for name, of_sequences in zip(("kl", "kl_exact"), values, strict=False):
        mean, se = mean_se(of_sequences.tolist(), by_prompt)
        metrics |= {name: mean if plain else None, f"{name}_se": se if plain else None}
    tokens = sum(len(ids) - start for ids, start in sequences)
    return metrics | {"perplexity_ref": math.exp(-values[2].double().sum().item() / tokens)}


def _warn_of_another_policy(source: str, differences: Tensor, by_prompt: Sequence[str], temperature: float) -> None:
    """Warn where log-ratio and exact KL differ: of a policy's samples both have the same mean."""
    off, error = mean_se(differences.double().tolist(), by_prompt)
    if abs(off) > max(_ALLOWED * error, _LEAST) and len(set(by_prompt)) >= _ENOUGH:
        log.warn(
            f"{source}: log-ratios and exact KLs differ by {off:.2f} +- {error:.2f} nats on average, more than chance: "
            f"are these plain samples of --model at temperature {temperature:g}?"
        )


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
    tokens = sum(map(size, sequences))
    return math.exp(-logps.double().sum().item() / tokens)


def tokens_of(lm: Loaded, completions: Sequence[dict]) -> int:
    """How many tokens the perplexity of the completions is taken over."""
    return sum(map(size, _sequences_of(lm, completions)))


def _sequences_of(lm: Loaded, completions: Sequence[dict]) -> Sequences:
    """(ids, start of the completion) of completions, perhaps with gaps, by a language model's tokenizer."""
    encoded = [row_tokens(lm.codec, row, finished=row.get("finish") == "stop") for row in completions]
    return [sequence_of(prompt, ids, gaps) for prompt, ids, gaps in encoded if prompt and ids]
