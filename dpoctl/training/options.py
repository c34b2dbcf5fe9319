"""Groups of options that travel together through training; the config classes of the commands satisfy them."""

from typing import Protocol

from ..inference.options import EvaluationOptions, ScoringOptions, TemplateArguments
from .optimization import OptimizerOptions, ScheduleOptions
from .pairs import StreamOptions


class HubOptions(Protocol):
    """Whether code that comes with a language model may run."""

    @property
    def trust_remote_code(self) -> bool: ...


class ModelOptions(HubOptions, Protocol):
    """The model that a command trains."""

    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str | None: ...


class CodecOptions(ModelOptions, TemplateArguments, Protocol):
    """The model whose tokenizer and chat template encode a command's data."""


class ComputeOptions(Protocol):
    """Where and in which precision a command computes, and how ranks wait for each other."""

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def rank_timeout(self) -> float: ...


class LoraOptions(Protocol):
    """The adapters of --lora."""

    @property
    def lora(self) -> int | None: ...

    @property
    def lora_alpha(self) -> float | None: ...

    @property
    def lora_targets(self) -> str | None: ...

    @property
    def use_dora(self) -> bool: ...

    @property
    def use_rslora(self) -> bool: ...

    @property
    def quantize(self) -> str | None: ...

    @property
    def seed(self) -> int: ...


class AdapterOptions(LoraOptions, ModelOptions, Protocol):
    """The model that a command trains, and its adapters."""


class ShardingOptions(Protocol):
    """How several devices share a model."""

    @property
    def parallel(self) -> str: ...


class LoadingOptions(HubOptions, ShardingOptions, Protocol):
    """How a model is loaded, and whether it will be sharded."""

    @property
    def quantize(self) -> str | None: ...


class TrainedModelOptions(LoadingOptions, ModelOptions, Protocol):
    """How the model that a command trains is loaded."""

    @property
    def lora(self) -> int | None: ...


class LengthOptions(Protocol):
    """The longest sequences, in tokens."""

    @property
    def max_length(self) -> int: ...

    @property
    def max_prompt_length(self) -> int: ...


class ShardedTextOptions(ShardingOptions, LengthOptions, Protocol):
    """How several devices share a model, and the texts that they forward."""


class TrainingOptions(
    AdapterOptions, CodecOptions, ComputeOptions, ShardedTextOptions, OptimizerOptions, ScheduleOptions, Protocol
):
    """What every training task and the loop read."""

    @property
    def out(self) -> str: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def max_grad_norm(self) -> float: ...

    @property
    def tokens_per_batch(self) -> int: ...

    @property
    def activation_checkpointing(self) -> bool: ...

    @property
    def eval_every(self) -> int | None: ...

    @property
    def log_every(self) -> int: ...

    @property
    def log_to(self) -> str | None: ...

    @property
    def save_every(self) -> int: ...

    @property
    def save_dtype(self) -> str: ...

    @property
    def keep_checkpoints(self) -> int: ...


class DataOptions(Protocol):
    """The files of rows that are trained on and held out, and how they are read."""

    @property
    def data(self) -> tuple[str, ...]: ...

    @property
    def eval_data(self) -> tuple[str, ...]: ...

    @property
    def skip_bad_rows(self) -> bool: ...

    @property
    def columns(self) -> str | None: ...


class BatchOptions(TrainingOptions, Protocol):
    """What tasks read whose update is one optimizer step."""

    @property
    def router_aux_loss_coef(self) -> float | None: ...


class FrontierOptions(EvaluationOptions, ScoringOptions, HubOptions, ShardingOptions, Protocol):
    """What --eval-prompts reads."""

    @property
    def eval_prompts(self) -> str | None: ...

    @property
    def eval_limit(self) -> int | None: ...

    @property
    def skip_bad_rows(self) -> bool: ...

    @property
    def columns(self) -> str | None: ...

    @property
    def max_prompt_length(self) -> int: ...

    @property
    def scorer(self) -> str: ...

    @property
    def keep_samples(self) -> bool: ...

    @property
    def reference(self) -> tuple[str, str | None]: ...

    @property
    def seed(self) -> int: ...

    @property
    def out(self) -> str: ...


class PlanOptions(AdapterOptions, ShardingOptions, OptimizerOptions, Protocol):
    """What the plan of a training command reads."""

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def activation_checkpointing(self) -> bool: ...

    @property
    def plan_world_size(self) -> int | None: ...

    @property
    def plan_device(self) -> str | None: ...


class PairPlanOptions(PlanOptions, CodecOptions, StreamOptions, LengthOptions, DataOptions, Protocol):
    """What the plan of a training on preferences reads."""

    @property
    def tokens_per_batch(self) -> int: ...
