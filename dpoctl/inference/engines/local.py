"""The sampler of this package, on a model that transformers loaded: the default engine."""

from typing import Any

from ...models import quantized
from ...models.load import Loaded, context_length
from ...models.most_probable import most_probable
from ...models.perturbation import perturbation_of
from ...runtime.devices import Compute
from ..generate import Completion, PromptTokens, Sampling, generate
from .engine import Engine


class LocalEngine(Engine):
    """A loaded policy. Rounding depends on what shares a batch: equal batches give equal bytes on one machine."""

    def __init__(self, policy: Loaded, compute: Compute):
        self.policy, self.compute = policy, compute
        self.codec, self.context = policy.codec, context_length(policy.model)

    def cost(self) -> dict[str, Any]:
        values = perturbation_of(self.policy.model)
        weights = quantized.count(self.policy.model) + (values.weights if values else 0)
        return {
            "flops_per_token": 2 * weights,
            "peak_memory_bytes": self.compute.peak_memory_bytes(),
            "device": self.compute.name,
        }

    def complete(self, prompts: list[PromptTokens], ks: list[int], sampling: Sampling) -> list[list[Completion]]:
        with self.compute.autocast():
            found = generate(self.policy.model, self.policy.tokenizer, prompts, ks, sampling)
            if self.alternatives:
                self._add_alternatives(prompts, found, sampling.temperature or 1.0)
        return found

    def _add_alternatives(self, prompts: list[PromptTokens], found: list[list[Completion]], temperature: float) -> None:
        """The distributions from which the tokens were drawn, by another forward pass over prompts and completions."""
        pairs = [(prompt, each) for prompt, completions in zip(prompts, found, strict=True) for each in completions]
        sequences = [(prompt.ids + completion.ids, len(prompt.ids)) for prompt, completion in pairs]
        tokens = most_probable(self.policy.model, sequences, self.alternatives, temperature)
        for (_, completion), of_completion in zip(pairs, tokens, strict=True):
            completion.alternatives = of_completion
