"""A server that holds the model."""

from typing import Any

from ...data.codec import Codec
from ...errors import InputError
from ..generate import Completion, PromptTokens, Sampling
from ..options import EngineOptions
from .engine import Engine


class ServerEngine(Engine):
    """Completions of a server, asked for by token ids."""

    def __init__(self, options: EngineOptions, codec: Codec, context: int | None):
        self.codec, self.context = codec, context
        raise InputError(
            f"{options.base_url} {options.served_model} {options.concurrency} {options.timeout} {options.retries}"
        )

    def cost(self) -> dict[str, Any]:
        raise NotImplementedError

    def complete(self, prompts: list[PromptTokens], ks: list[int], sampling: Sampling) -> list[list[Completion]]:
        raise NotImplementedError
