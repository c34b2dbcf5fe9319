"""Low-rank adapters (2106.09685) on a frozen model, by peft: added before training, switched off for the reference."""

import warnings

import torch

from ..errors import InputError


def adapt(model, config, base: str, task: str | None):
    """peft's wrapper of `model`, whose linear layers get adapters that change nothing yet; all else is frozen.

    `model` itself is what is trained and forwarded: its layers are replaced in place. `config`: `lora` (the rank),
    `lora_alpha`, `lora_targets` and the seed of the adapters' A. `task`: CAUSAL_LM, or SEQ_CLS, whose score head is
    trained too. The wrapper saves the adapters, naming `base`, and `disable_adapter()` of it gives the reference.
    Raises InputError: peft is not installed, no such layers, layers that are read without their adapter.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs peft", hint="pip install 'dpoctl[lora]'") from None
    targets = config.lora_targets or "all-linear"
    names = targets if targets == "all-linear" else targets.split(",")
    settings = LoraConfig(
        r=config.lora,
        lora_alpha=config.lora_alpha or 2 * config.lora,
        target_modules=names,
        exclude_modules=["score"] if hasattr(model, "score") else None,
        fan_in_fan_out=_keeps_weights_transposed(model),
        task_type=task,
        base_model_name_or_path=base,
    )
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(config.seed)
        try:
            wrapper = get_peft_model(model, settings)
        except ValueError as e:
            raise InputError(f"--lora-targets {targets}: {str(e).splitlines()[0][:200]}", _layers_hint(model)) from None
    if any(
        a is not b for a, b in zip(ends, [model.get_input_embeddings(), model.get_output_embeddings()], strict=True)
    ):
        raise InputError(f"--lora-targets {targets}: embeddings and output head stay as they are", "leave them out")
    wrapper.peft_config["default"].base_model_name_or_path = base
    return wrapper.eval()


def _keeps_weights_transposed(model) -> bool:
    """GPT-2's Conv1D does."""
    return any(type(m).__name__ == "Conv1D" for m in model.modules())


def _layers_hint(model) -> str:
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    return f"all-linear, or some of {', '.join(sorted(linear))}"
