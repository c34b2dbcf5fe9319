"""Load complete weights through transformers, or the empty shape of a model, and refuse anything doubtful by name.

Weights are safetensors, or pickles of which only tensors are read. Every dropout is 0.
"""

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.utils import logging as hf_logging

from ..errors import InputError
from . import experts, quantized

# Not causal, but their weights load as a causal model without complaint, because the head is tied.
_NOT_CAUSAL = ("ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")

# peft imports bitsandbytes wherever it is installed, which then advises on kernels that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_HINT = "is the copy complete, and its architecture known to the installed transformers?"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the path that the user gave, for messages, and the local folder of its files."""

    path: str
    folder: str
    trust_remote_code: bool = False


def load_complete(
    auto_class: Any,
    source: Source,
    dtype: torch.dtype,
    *,
    new_head: int | None = None,
    options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The model in eval mode, every weight read from the files; `options` are further ones of `from_pretrained`.

    With `new_head` (a number of labels) the classification head alone may be missing; transformers then initialises it.
    Raises InputError: no weights, files that cannot be read, weights of other shapes, missing weights, a model that is
    not causal where a causal one is expected.
    """
    _check_files(source)
    head = {} if new_head is None else {"num_labels": new_head}
    with quiet(), as_input_error(f"{source.path}: the model cannot be loaded", _hint_for(source)):
        model, info = auto_class.from_pretrained(
            source.folder,
            dtype=dtype,
            trust_remote_code=source.trust_remote_code,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **head,
            **(options or {}),
        )
    quantized.prepare(model)
    _check_loaded(auto_class, source.path, model, info, new_head)
    return prepared(model)


def load_shape(auto_class: Any, source: Source, dtype: torch.dtype, *, new_head: int | None = None) -> PreTrainedModel:
    """The model that config.json describes, on the meta device: shapes without numbers, and without the weight files.

    Raises InputError.
    """
    head = {} if new_head is None else {"num_labels": new_head}
    with quiet(), as_input_error(f"{source.path}: config.json cannot be read"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code, **head)
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)
    return prepared(model)


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode without dropout, with the fused GELU, with experts in the autocast dtype, and with no
    loss of its own.

    What its configuration said is kept for `settings_as_loaded`.
    """
    _remove_dropout(model)
    _fuse_gelu(model)
    experts.register()
    return model.eval()


def _check_files(source: Source) -> None:
    files = Path(source.folder)
    if not any(files.glob("*.safetensors")) and not any(files.glob("pytorch_model*.bin")):
        raise InputError(f"{source.path}: it has no weights", "expected model.safetensors (or pytorch_model.bin) in it")
    if not any(files.glob("model*.safetensors")) and (files / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{source.path}: an adapter, not a complete model", "merge it into its base first (dpoctl merge)"
        )


def _hint_for(source: Source) -> str:
    """What to do about a model that cannot be loaded."""
    if method := quantized.method_of(source.folder):
        return (
            f"its weights are quantised ({method}), which needs that method's package and may need a GPU; otherwise "
            "give the checkpoint in full precision that it was made from"
        )
    return _HINT


def _check_loaded(auto_class: Any, path: str, model: PreTrainedModel, info: dict, new_head: int | None) -> None:
    """Raises InputError where transformers substituted random numbers, or loaded a model of another kind."""
    causal = auto_class is AutoModelForCausalLM
    architectures = model.config.architectures or []
    if causal and architectures and all(a.endswith(_NOT_CAUSAL) for a in architectures):
        raise InputError(f"{path}: a {architectures[0]}, where a causal language model is expected")
    for name, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{name} is {list(found)} in the weights, {list(expected)} by config.json"
        raise InputError(f"{path}: {shapes}", "config.json and weights are not of the same model")
    missing = sorted(info["missing_keys"]) + sorted(info["error_msgs"])
    if new_head:
        missing = [name for name in missing if not name.startswith("score.")]
    if missing:
        wanted = "a causal language model" if causal else "a sequence classifier"
        kind = f", {architectures[0]}," if architectures else ""
        raise InputError(
            f"{path}{kind} cannot serve as {wanted}: {len(missing)} of its weights are missing ({missing[0]} ...)",
            hint="the directory holds a model of another kind, or was saved incompletely",
        )


def _remove_dropout(model: PreTrainedModel) -> None:
    """Set every dropout to 0: in modules, in the attributes that attention functions read, and in the configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        else:
            _zero_dropouts(module)
    model._dpoctl_loaded = [_neutralize(config) for config in _configs(model)]


def _configs(model: Any) -> list[PretrainedConfig]:
    """The configuration of a model, and that of its decoder where it is a part of it."""
    config, inner = model.config, model.config.get_text_config()
    return [config] if inner is config else [config, inner]


def _zero_dropouts(target: torch.nn.Module | PretrainedConfig) -> dict[str, float]:
    """Set the dropout probabilities among an object's attributes to 0; returns what they were."""
    found = {
        name: value
        for name, value in vars(target).items()
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
    for name in found:
        setattr(target, name, 0.0)
    return found


def _neutralize(config: PretrainedConfig) -> dict[str, Any]:
    """Remove dropout and the router's loss from a configuration; returns what was set."""
    found: dict[str, Any] = dict(_zero_dropouts(config))
    if getattr(config, "output_router_logits", False):
        found["output_router_logits"] = config.output_router_logits
        config.output_router_logits = False
    return found


def loaded_setting(model: Any, name: str) -> Any:
    """A setting of the configuration as it was loaded, where it has been neutralized; else None."""
    return next((values[name] for values in getattr(model, "_dpoctl_loaded", []) if name in values), None)


@contextmanager
def settings_as_loaded(model: Any) -> Iterator[None]:
    """The model's configuration as it was loaded, to be saved."""
    loaded = getattr(model, "_dpoctl_loaded", [])
    for config, values in zip(_configs(model), loaded, strict=False):
        for name, value in values.items():
            setattr(config, name, value)
    try:
        yield
    finally:
        for config, _ in zip(_configs(model), loaded, strict=False):
            _neutralize(config)


def _fuse_gelu(model: PreTrainedModel) -> None:
    """Replace GPT-2's tanh GELU by torch's single kernel: equal up to rounding, and it keeps fewer activations."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])


# --- what the libraries print and raise ------------------------------------------------------------------------------


def silence_transformers() -> None:
    """Turn off transformers' progress bars and its advice, which is meant for its own trainers."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress everything that transformers prints: what matters in it is raised as an InputError."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def as_input_error(what: str, hint: str = _HINT) -> Iterator[None]:
    """Turn whatever the libraries raise over a user's files into an InputError; out of memory passes through."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        if isinstance(e, pickle.UnpicklingError):
            raise InputError(
                f"{what}: a pickle of more than tensors, or a damaged one", "save it as safetensors"
            ) from e
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError(f"{what}: {type(e).__name__}: {reason[:300]}", hint) from e
