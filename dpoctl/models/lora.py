"""Low-rank adapters (2106.09685) on a frozen model, by peft: added before training, disabled for the reference."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from . import adapter

_SECOND = "second"  # the name of adapters beside attached ones
_MERGE = "merge it into its base first (dpoctl merge), and give the merged model as --model"


@dataclass(frozen=True)
class LoraSettings:
    """The adapters' `rank`, scale `alpha` (None: twice the rank), `targets`, and the `seed` of their matrices A.

    `targets`: names of linear layers, separated by commas; None adapts all of them. `dora` trains the magnitude of each
    output apart from its direction (2402.09353); `rslora` scales by alpha / sqrt(rank) (2312.03732).
    """

    rank: int
    alpha: float | None = None
    targets: str | None = None
    seed: int = 0
    dora: bool = False
    rslora: bool = False


def adapt(model: PreTrainedModel, settings: LoraSettings, base: str, task: str | None) -> Any:
    """peft's wrapper of `model`, whose linear layers get adapters that change nothing yet; all else is frozen.

    The layers of `model` are replaced in place, and `model` is what is trained and forwarded. `task`: CAUSAL_LM, or
    SEQ_CLS, whose score head is trained too. The wrapper saves the adapters, naming `base`, and its `disable_adapter()`
    gives the reference.
    Raises InputError: peft is not installed, no such layers, layers that are read without their adapter.
    """
    try:
        from peft import get_peft_model
    except ImportError:
        raise InputError("--lora needs peft", hint="pip install 'dpoctl[lora]'") from None
    targets = settings.targets or "all-linear"
    config = _config(model, settings, base, task)
    embeddings = _embeddings(model)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(settings.seed)
        try:
            wrapper = get_peft_model(model, config)
        except ValueError as e:
            raise InputError(f"--lora-targets {targets}: {str(e).splitlines()[0][:200]}", _layers_hint(model)) from None
    if any(a is not b for a, b in zip(embeddings, _embeddings(model), strict=True)):
        raise InputError(f"--lora-targets {targets}: embeddings and output head cannot be adapted", "leave them out")
    wrapper.peft_config["default"].base_model_name_or_path = base
    return wrapper.eval()


def add_to_attached(model: PreTrainedModel, settings: LoraSettings, base: str) -> None:
    """New adapters beside those that are attached to a model (`adapter.attach`); only the new ones are trained.

    `settings.targets` names the layers.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(_config(model, settings, base, None), model, _SECOND)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name for name in ("default", _SECOND) if name in module.r])
    for name, weight in model.named_parameters():
        weight.requires_grad_(f".{_SECOND}." in name)
    model.eval()


def adapted_layers(model: nn.Module) -> str:
    """The names of the layers of a model that have adapters, as `LoraSettings.targets` has them."""
    from peft.tuners.lora import LoraLayer

    return ",".join(sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, LoraLayer)}))


def _config(model: PreTrainedModel, settings: LoraSettings, base: str, task: str | None) -> Any:
    """peft's configuration of new adapters."""
    from peft import LoraConfig

    targets = settings.targets or "all-linear"
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        exclude_modules=["score"] if hasattr(model, "score") else None,
        fan_in_fan_out=_keeps_weights_transposed(model),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        task_type=task,
        base_model_name_or_path=base,
    )


def resume(model: PreTrainedModel, found: adapter.Adapter, settings: LoraSettings, base: str, task: str | None) -> Any:
    """`adapt`, with the layers and weights of an adapter that exists: training continues it.

    The options that `settings` gives must be the adapter's. `task` as in `adapt`; a reward model starts from a language
    model's adapter, too. Raises InputError: other options, an adapter of another kind than LoRA, one that trains
    embeddings or biases, one that does not fit the model.
    """
    _check_resumed(found, settings)
    embeddings = _embeddings(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = adapter.attach(model, found, base, task)
    if any(a is not b for a, b in zip(embeddings, _embeddings(model), strict=True)):
        raise InputError(f"--lora: {found.path} adapts embeddings or the output head", hint=_MERGE)
    wrapper.peft_config["default"].base_model_name_or_path = base
    return wrapper


def _check_resumed(found: adapter.Adapter, settings: LoraSettings) -> None:
    """Raises InputError where an adapter cannot be continued, or not with these settings."""
    path, config = found.path, found.config
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise InputError(f"--lora: {path} is an adapter of another kind ({config.peft_type})", hint=_MERGE)
    if config.bias != "none" or getattr(config, "lora_bias", False):
        raise InputError(f"--lora: {path} trains biases (bias: {config.bias!r})", hint=_MERGE)
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights != "gaussian":
        raise InputError(f"--lora: {path} changes its base (init_lora_weights: {config.init_lora_weights!r})", _MERGE)
    known = {config.target_modules} if isinstance(config.target_modules, str) else set(config.target_modules)
    targets = None if settings.targets == "all-linear" else settings.targets
    given = {
        "--lora": (settings.rank, config.r),
        "--lora-alpha": (settings.alpha, config.lora_alpha),
        "--lora-targets": (targets and set(targets.split(",")), known),
        "--use-dora": (settings.dora or None, config.use_dora),
        "--use-rslora": (settings.rslora or None, config.use_rslora),
    }
    for flag, (wanted, has) in given.items():
        if wanted is not None and wanted != has:
            shown = ",".join(sorted(has)) if isinstance(has, set) else has
            raise InputError(
                f"{flag}: {path} is an adapter itself, which training continues, and its value is {shown}",
                hint=f"--lora {config.r} and no other options of the adapters continue it; new adapters need a model "
                "that it is merged into (dpoctl merge)",
            )


def _embeddings(model: PreTrainedModel) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _keeps_weights_transposed(model: nn.Module) -> bool:
    """Whether the model has GPT-2's Conv1D layers."""
    return any(type(m).__name__ == "Conv1D" for m in model.modules())


def _layers_hint(model: nn.Module) -> str:
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    return f"all-linear, or some of {', '.join(sorted(linear))}"
