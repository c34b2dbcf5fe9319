"""A peft adapter merged into its base: one ordinary model, whose directory needs no peft to be loaded."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import InputError
from .load import load_policy, load_reward_start, load_tokenizer

_WEIGHTS = "adapter_model.safetensors"


def load_merged(adapter: str, base: str, revision: str | None = None, trust_remote_code: bool = False):
    """(model, tokenizer) of the language model `base` with the weights of `adapter` added, in float32 on the CPU.

    The adapter's own tokenizer is taken where it has one. Raises InputError: peft is not installed; no adapter, one of
    another kind of model, or one that does not fit the base; whatever `load_policy` raises of the base.
    """
    config, weights = _read(adapter)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise InputError(f"{adapter}: an adapter of task {config.task_type}, where a language model's is expected")
    model, tokenizer = load_policy(base, revision=revision, trust_remote_code=trust_remote_code)
    folder = Path(adapter).expanduser()
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(adapter, folder=str(folder))
    return _merged(model, config, weights, adapter, base), tokenizer


def is_reward(adapter: str) -> bool:
    """Whether an adapter's directory is one of train-rm's: adapters, score head, and the reward's shift and scale."""
    return "reward_shift" in _shape(Path(adapter).expanduser())


def load_merged_reward(adapter: str, base: str, revision: str | None = None, trust_remote_code: bool = False):
    """(model, tokenizer) of a reward model that train-rm saved as adapters and score head; raises as `load_merged`."""
    config, weights = _read(adapter)
    own = _shape(Path(adapter).expanduser())
    if config.task_type != "SEQ_CLS" or not {"reward_shift", "reward_scale"} <= set(own):
        raise InputError(f"{adapter}: an adapter of task {config.task_type}, where one of train-rm's is expected")
    model, tokenizer = load_reward_start(base, revision=revision, trust_remote_code=trust_remote_code)
    model.config.reward_shift, model.config.reward_scale = own["reward_shift"], own["reward_scale"]
    return _merged(model, config, weights, adapter, base).eval(), tokenizer


def _read(adapter: str):
    """(peft's configuration, weights) of an adapter's directory."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise InputError(f"{adapter}: an adapter, which needs peft", hint="pip install 'dpoctl[lora]'") from None
    folder = Path(adapter).expanduser()
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{adapter}: no adapter, it has no {_WEIGHTS}", hint="give what peft's save_pretrained wrote")
    try:
        return PeftConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise InputError(
            f"{adapter}: cannot be read as an adapter: {_first_line(e)}", hint="is the copy complete?"
        ) from e


def _shape(folder: Path) -> dict:
    """The adapter's config.json, which train-rm writes beside it; empty where there is none."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise InputError(f"{folder / 'config.json'}: {e}", hint="is the copy complete?") from None


def _merged(model, config, weights: dict, adapter: str, base: str):
    """The model with the adapter's weights added; every weight of the adapter has its place, and every place a weight."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        adapted = get_peft_model(model, config)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        strange = expected - set(weights) or set_peft_model_state_dict(adapted, weights).unexpected_keys
        if strange:
            raise ValueError(f"{sorted(strange)[0]} is in one of them alone")
        return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)  # an ordinary model again: peft froze it
    except (RuntimeError, ValueError, KeyError) as e:
        hint = f"was the adapter trained on {base}?"
        raise InputError(f"{adapter}: does not fit {base}: {_first_line(e)}", hint=hint) from e


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if str(error).startswith("Error(s) in loading") else 0][:200] if lines else type(error).__name__
