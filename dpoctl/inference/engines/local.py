"""The sampler of this package, on a model that transformers loaded: the default engine."""

from typing import Any

from ...models import quantized
from ...models.load import Loaded, context_length
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
            return generate(self.policy.model, self.policy.tokenizer, prompts, ks, sampling)
