"""Options of judge where a model in this process is the judge: how it is loaded, and its engine."""

from collections.abc import Iterator
from dataclasses import dataclass

from .conditions import one_of
from .engines import Engines, engine_argument_mistakes
from .sampling import Generation
from .schema import like
from .shared import ChatTemplates, ModelOptions

LOCAL = one_of("backend", "vllm", "transformers")
_VLLM, _TRANSFORMERS = one_of("backend", "vllm"), one_of("backend", "transformers")


@dataclass(frozen=True, kw_only=True)
class LocalJudge:
    """A command that may ask a judge in this process."""

    revision: str | None = like(ModelOptions, "revision", when=LOCAL)
    trust_remote_code: bool = like(ModelOptions, "trust_remote_code", when=LOCAL)
    chat_template: str | None = like(ChatTemplates, "chat_template", when=LOCAL)
    engine_batch_size: int = like(
        Engines,
        "engine_batch_size",
        when=_VLLM,
        help="Requests answered at a time: what a kill loses at most.",
    )
    tensor_parallel_size: int = like(Engines, "tensor_parallel_size", when=_VLLM, identity=False)
    gpu_memory_utilization: float = like(Engines, "gpu_memory_utilization", when=_VLLM)
    max_model_len: int | None = like(Engines, "max_model_len", when=_VLLM)
    engine_arg: tuple[str, ...] = like(Engines, "engine_arg", when=_VLLM)
    generation_batch_size: int = like(
        Generation,
        "generation_batch_size",
        32,
        when=_TRANSFORMERS,
        identity=False,
        help="Requests answered in one batch.",
    )

    def check_engine_arg(self) -> Iterator[str]:
        yield from engine_argument_mistakes(self.engine_arg)
