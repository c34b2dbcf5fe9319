"""Read a peft adapter and merge it into its base: the result is an ordinary model that loads without peft."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter's directory in memory: `shape` is its config.json (train-rm writes one), empty where there is none."""

    path: str
    config: Any  # peft's PeftConfig
    weights: dict[str, Tensor]
    shape: dict[str, Any]

    @property
    def task_type(self) -> str | None:
        """peft's task type, such as CAUSAL_LM or SEQ_CLS."""
        return self.config.task_type


def read(path: str) -> Adapter:
    """The adapter in a directory. Raises InputError: peft is not installed, no adapter, files that cannot be read."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise InputError(f"{path}: an adapter, which needs peft", hint="pip install 'dpoctl[lora]'") from None
    folder = Path(path).expanduser()
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{path}: no adapter, it has no {_WEIGHTS}", hint="give what peft's save_pretrained wrote")
    try:
        config, weights = PeftConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        reason = _main_line(e)
        raise InputError(f"{path}: cannot be read as an adapter: {reason}", hint="is the copy complete?") from e
    return Adapter(path, config, weights, _shape(folder))


def is_reward(path: str) -> bool:
    """Whether train-rm wrote the adapter: adapters, score head, and the reward's shift and scale."""
    return "reward_shift" in _shape(Path(path).expanduser())


def merge_into(model: PreTrainedModel, adapter: Adapter, base: str) -> PreTrainedModel:
    """`model` with the adapter's weights merged in; `base` names the model in messages.

    Raises InputError where a weight of the adapter has no layer in the model, or a layer no weight.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        adapted = get_peft_model(model, adapter.config)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        missing = expected - set(adapter.weights)
        unmatched = missing or set_peft_model_state_dict(adapted, adapter.weights).unexpected_keys
        if unmatched:
            raise ValueError(f"{sorted(unmatched)[0]} is in one of them alone")
        return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)  # peft froze the base
    except (RuntimeError, ValueError, KeyError) as e:
        hint = f"was the adapter trained on {base}?"
        raise InputError(f"{adapter.path}: does not fit {base}: {_main_line(e)}", hint=hint) from e


def _shape(folder: Path) -> dict[str, Any]:
    """The config.json beside an adapter; empty where there is none."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise InputError(f"{folder / 'config.json'}: {e}", hint="is the copy complete?") from None


def _main_line(error: Exception) -> str:
    """The most telling line of an error: the last of torch's load_state_dict errors, the first of others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if str(error).startswith("Error(s) in loading") else 0][:200] if lines else type(error).__name__
