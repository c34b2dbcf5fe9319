"""Saving a model and its tokenizer as an ordinary Hugging Face directory."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import InputError
from ..outputs import adapter_base
from ..outputs.files import move_into, writing
from .pretrained import settings_as_loaded
from .tokenizers import end_tokens


def save_model(
    model: Any,
    tokenizer: Any,
    out: Path,
    dtype: torch.dtype,
    state: dict[str, torch.Tensor] | None = None,
    ends: Collection[int] = (),
) -> list[Path]:
    """Save model and tokenizer in `out`, each file complete or absent, and return the files.

    `state` holds the weights where the model itself has only this rank's shards of them. `ends`: the end tokens that
    the generation configuration names, where they are not those of the model. Raises StorageError.
    """
    tmp = out / ".saving"
    shutil.rmtree(tmp, ignore_errors=True)
    if state is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    elif dtype != torch.float32:
        model = _adapters_to(model, dtype) if hasattr(model, "peft_config") else model.to(dtype)
    model.config.dtype = dtype
    # An adapter's embeddings are the base's, also where train-rm added a row for padding: loading adds it again.
    only = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with writing(tmp, sum(p.numel() * p.element_size() for p in model.parameters())), _as_loaded(model):
        model.save_pretrained(tmp, state_dict=state, **only)
        (tmp / "README.md").unlink(missing_ok=True)  # peft's empty model card
        if hasattr(model.config, "reward_shift"):  # adapter_config.json has no place for these
            model.config.save_pretrained(tmp)
        if base := getattr(model, "_dpoctl_base", None):  # of adapters that training added
            adapter_base.write_record(base, tmp, out)
        tokenizer.save_pretrained(tmp)
        if ends and set(ends) != set(end_tokens(str(tmp)) or ()):
            _save_ends(tmp, ends)
        return move_into(tmp, out)


def _adapters_to(wrapper: Any, dtype: torch.dtype) -> Any:
    """Cast the weights that are trained, which alone are saved: a quantised base cannot be cast."""
    for weight in wrapper.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    return wrapper


def _save_ends(folder: Path, ends: Collection[int]) -> None:
    """Let the generation configuration in `folder` name the end tokens; generation elsewhere stops there too."""
    has_one = (folder / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(folder) if has_one else GenerationConfig()
    config.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends))
    config.save_pretrained(folder)


def check_saving(model: Any, tokenizer: Any, out: Path) -> None:
    """Save and move everything but the weights, then remove it, so that a run that cannot be saved is not started.

    Raises InputError for a configuration or a tokenizer that cannot be saved, StorageError as `save_model`.
    """
    tmp, moved = out / ".saving", out / ".saved.tmp"
    try:
        with writing(tmp), _as_loaded(model):
            tmp.mkdir(parents=True, exist_ok=True)
            for name, part in _small_parts(model, tokenizer):
                _save_part(name, part, tmp)
            move_into(tmp, moved)
    finally:
        for folder in (tmp, moved):
            shutil.rmtree(folder, ignore_errors=True)


def _small_parts(model: Any, tokenizer: Any) -> list[tuple[str, Any]]:
    parts = [("configuration", model.config), ("generation configuration", getattr(model, "generation_config", None))]
    return [part for part in [*parts, ("tokenizer", tokenizer)] if part[1] is not None]


def _save_part(name: str, part: Any, folder: Path) -> None:
    try:
        part.save_pretrained(folder)
    except OSError:
        raise
    except Exception as e:
        reason = (str(e).strip().splitlines() or [""])[0][:300]
        raise InputError(
            f"--model: its {name} was read, but cannot be saved with the trained model: {type(e).__name__}: {reason}",
            hint="load it with transformers, mend it until its save_pretrained works, and train from that directory",
        ) from e


@contextmanager
def _as_loaded(model: Any) -> Iterator[None]:
    """The model's configurations as they were read: with dropout, and generation flags that contradict."""
    with suppress(
        AttributeError
    ):  # transformers refuses to save contradicting flags only of a configuration it changed
        generation = model.generation_config
        generation._original_object_hash = hash(generation)
    with settings_as_loaded(model):
        yield
