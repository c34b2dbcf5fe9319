"""Read a peft adapter, and merge it into its base or put its layers in place there.

A merged model is an ordinary one, which loads without peft. An attached adapter stays apart from its base: training
continues it, and a quantised base, whose weights cannot be changed, keeps its own.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names of a model's weights within peft's


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


def merge_into(model: PreTrainedModel, adapter: Adapter, base: str, tokens: int) -> PreTrainedModel:
    """`model` with the adapter's weights merged in; `base` names the model in messages.

    Where the adapter was trained with added tokens (modules_to_save, trainable_token_indices), the embeddings grow to
    its number of rows, or to the `tokens` of its tokenizer. Raises InputError where a weight of the adapter has no
    layer in the model, or a layer no weight.
    """
    add_rows(model, adapter, tokens)
    with _fitting(adapter, base):
        adapted = _adapted(model, adapter, adapter.config)
        merged = adapted.merge_and_unload(safe_merge=True).requires_grad_(True)  # peft froze the base
    _untie(merged)
    return merged


def attach(model: PreTrainedModel, adapter: Adapter, base: str, task: str | None = None) -> Any:
    """peft's wrapper of `model`, in whose layers the adapter's are put in place, unmerged; only they are trained.

    `model` is changed in place and is what is forwarded. With `task` SEQ_CLS the adapter may be a language model's: the
    classifier then keeps its head, which is trained too. `base` names the model in messages.
    Raises InputError as `merge_into` does; the embeddings have the adapter's rows already (`add_rows`).
    """
    config = copy.deepcopy(adapter.config)
    config.inference_mode = False
    config.task_type = task or adapter.task_type
    with _fitting(adapter, base):
        wrapper = _adapted(model, adapter, config, new_head=task == "SEQ_CLS" and adapter.task_type != "SEQ_CLS")
    for module in wrapper.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # as everywhere; the configuration that is saved keeps it
    return wrapper.eval()


def attach_frozen(model: PreTrainedModel, adapter: Adapter, base: str) -> None:
    """`attach` to a model that is not trained; modules that the adapter holds whole, such as a head, are plain."""
    attach(model, adapter, base)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "ModulesToSaveWrapper":
            model.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    model.requires_grad_(False)


@contextmanager
def _fitting(adapter: Adapter, base: str) -> Iterator[None]:
    """Turn what peft and torch raise where an adapter and a model are not made for each other into an InputError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, IndexError) as e:
        hint = f"was the adapter trained on {base}?"
        raise InputError(f"{adapter.path}: does not fit {base}: {_main_line(e)}", hint=hint) from e


def _adapted(model: PreTrainedModel, adapter: Adapter, config: Any, *, new_head: bool = False) -> Any:
    """peft's wrapper of `model` with the adapter's weights; raises ValueError where a weight has no counterpart."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    weights = _without_copies(model, adapter.weights)
    adapted = get_peft_model(model, config)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if new_head:  # the classifier's own, which peft expects to be told
        weights |= {name: weight for name, weight in expected.items() if ".score." in name}
    missing = set(expected) - set(weights)
    unmatched = missing or set_peft_model_state_dict(adapted, weights).unexpected_keys
    if unmatched:
        raise ValueError(f"{sorted(unmatched)[0]} is in one of them alone")
    return adapted


def add_rows(model: PreTrainedModel, adapter: Adapter, tokens: int) -> None:
    """Resize the embeddings of a base to those that the adapter was trained with; rows that it does not hold are 0."""
    rows = model.get_input_embeddings().weight.shape[0]
    names = _embedding_names(model)
    whole = {f"{_PREFIX}{name}{end}" for name in names for end in (".weight", ".token_adapter.base_layer.weight")}
    wanted = [weight.shape[0] for key, weight in adapter.weights.items() if key in whole]
    trained = getattr(adapter.config, "trainable_token_indices", None) or []
    indices = [i for each in (trained.values() if isinstance(trained, dict) else [trained]) for i in each]
    if any(i >= rows for i in indices):
        wanted.append(max(tokens, max(indices) + 1))
    if not wanted or max(wanted) == rows:
        return
    model.resize_token_embeddings(max(wanted), mean_resizing=False)
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight[rows:].zero_()  # random numbers otherwise


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """The names of the modules that are the input and the output embedding, in this order."""
    named = {id(module): name for name, module in model.named_modules()}
    return [named[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]


def _without_copies(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's weights without those that peft writes twice where it saves resized embeddings as well."""
    kept = {}
    for key, weight in weights.items():
        if key.endswith(".original_module.weight"):
            continue
        plain = key.replace(".modules_to_save.weight", ".weight")
        if plain == key or plain not in weights:
            kept[plain] = weight
    names = _embedding_names(model)
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False) and len(names) == 2:
        kept.pop(f"{_PREFIX}{names[1]}.token_adapter.trainable_tokens_delta", None)  # the input embedding's
    return kept


def _untie(model: PreTrainedModel) -> None:
    """Say in the configuration that input and output embeddings differ, where the adapter trained one of them alone."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    if output is not None and getattr(config, "tie_word_embeddings", False):
        if output.weight is not model.get_input_embeddings().weight:
            config.tie_word_embeddings = model.config.tie_word_embeddings = False


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
