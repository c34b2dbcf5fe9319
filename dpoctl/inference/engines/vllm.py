"""vLLM in this process."""

from typing import Any

from ...data.codec import Codec
from ...errors import InputError
from ..generate import Completion, PromptTokens, Sampling
from ..options import EngineOptions
from .engine import Engine


class VllmEngine(Engine):
    """vLLM's offline engine."""

    before_scorer = True

    def __init__(self, options: EngineOptions, model: str, codec: Codec, context: int | None):
        self.codec, self.context = codec, context
        raise InputError(
            f"{options.tensor_parallel_size}{options.gpu_memory_utilization}{options.max_model_len}{options.engine_arg}"
        )

    def cost(self) -> dict[str, Any]:
        raise NotImplementedError

    def complete(self, prompts: list[PromptTokens], ks: list[int], sampling: Sampling) -> list[list[Completion]]:
        raise NotImplementedError
