"""Saving a model and its tokenizer as an ordinary Hugging Face directory."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..outputs.files import move_into, writing
from .load import end_tokens


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
        model = model.to(dtype)
    model.config.dtype = dtype
    # An adapter's embeddings are the base's, also where train-rm added a row for padding: loading adds it again.
    only = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with writing(tmp, sum(p.numel() * p.element_size() for p in model.parameters())):
        model.save_pretrained(tmp, state_dict=state, **only)
        (tmp / "README.md").unlink(missing_ok=True)  # peft's empty model card
        if hasattr(model.config, "reward_shift"):  # adapter_config.json has no place for these
            model.config.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        if ends and set(ends) != set(end_tokens(str(tmp))):
            _save_ends(tmp, ends)
        return move_into(tmp, out)


def _save_ends(folder: Path, ends: Collection[int]) -> None:
    """Let the generation configuration in `folder` name the end tokens; generation elsewhere stops there too."""
    has_one = (folder / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(folder) if has_one else GenerationConfig()
    config.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends))
    config.save_pretrained(folder)
