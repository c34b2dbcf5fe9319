"""Low-rank adapters (2106.09685) on a frozen model, by peft: added before training, disabled for the reference."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError


@dataclass(frozen=True)
class LoraSettings:
    """The adapters' `rank`, scale `alpha` (None: twice the rank), `targets`, and the `seed` of their matrices A.

    `targets`: names of linear layers, separated by commas; None adapts all of them.
    """

    rank: int
    alpha: float | None = None
    targets: str | None = None
    seed: int = 0


def adapt(model: PreTrainedModel, settings: LoraSettings, base: str, task: str | None) -> Any:
    """peft's wrapper of `model`, whose linear layers get adapters that change nothing yet; all else is frozen.

    The layers of `model` are replaced in place, and `model` is what is trained and forwarded. `task`: CAUSAL_LM, or
    SEQ_CLS, whose score head is trained too. The wrapper saves the adapters, naming `base`, and its `disable_adapter()`
    gives the reference.
    Raises InputError: peft is not installed, no such layers, layers that are read without their adapter.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs peft", hint="pip install 'dpoctl[lora]'") from None
    targets = settings.targets or "all-linear"
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        exclude_modules=["score"] if hasattr(model, "score") else None,
        fan_in_fan_out=_keeps_weights_transposed(model),
        task_type=task,
        base_model_name_or_path=base,
    )
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(settings.seed)
        try:
            wrapper = get_peft_model(model, config)
        except ValueError as e:
            raise InputError(f"--lora-targets {targets}: {str(e).splitlines()[0][:200]}", _layers_hint(model)) from None
    adapted = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(a is not b for a, b in zip(embeddings, adapted, strict=True)):
        raise InputError(f"--lora-targets {targets}: embeddings and output head cannot be adapted", "leave them out")
    wrapper.peft_config["default"].base_model_name_or_path = base
    return wrapper.eval()


def _keeps_weights_transposed(model: nn.Module) -> bool:
    """Whether the model has GPT-2's Conv1D layers."""
    return any(type(m).__name__ == "Conv1D" for m in model.modules())


def _layers_hint(model: nn.Module) -> str:
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    return f"all-linear, or some of {', '.join(sorted(linear))}"
