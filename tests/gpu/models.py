"""The models that are measured on a GPU, with random weights: nine small architectures, and shapes of real models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _shape(width: int, heads: int = 4, kv: int | None = 2) -> dict[str, Any]:
    """Two layers whose heads are `width` wide."""
    grouped = {} if kv is None else {"num_key_value_heads": kv, "head_dim": width}
    return grouped | {
        "vocab_size": 512,
        "hidden_size": width * heads,
        "intermediate_size": 2 * width * heads,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
    }


def _gpt2() -> PreTrainedModel:
    shape = {"vocab_size": 512, "n_positions": 1024, "n_embd": 256, "n_layer": 2, "n_head": 4}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **_NO_DROPOUT))


def _gptj() -> PreTrainedModel:
    shape = {"vocab_size": 512, "n_positions": 1024, "n_embd": 512, "n_layer": 2, "n_head": 2, "rotary_dim": 64}
    return hf.GPTJForCausalLM(hf.GPTJConfig(**shape, **_NO_DROPOUT))


def _gemma3() -> PreTrainedModel:
    turns = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_shape(64), sliding_window=64, layer_types=turns))


# Widths of heads are those of the families' models: 80 (Pythia 2.8B), 96 (Phi-3), 128, and 256 (GPT-J, Gemma).
SMALL: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_shape(80, kv=None))),
    "gptj": _gptj,
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_shape(128))),
    "mistral, window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_shape(64), sliding_window=64)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_shape(128))),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_shape(256, heads=2, kv=1))),
    "gemma3, two windows": _gemma3,
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_shape(96, kv=4) | {"pad_token_id": 0})),
}

_LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
# Real models' public shapes; `tiny` tries the same code in seconds.
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("llama", _shape(16) | {"vocab_size": 2048}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20, **_NO_DROPOUT}),
    "1b": (
        "llama",
        _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    ),
    "8b": ("llama", _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
}


def write(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A directory of a model of REAL with a tokenizer, whose weights `random_weights` makes when they are loaded."""
    kind, shape = REAL[name]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = hf.AutoConfig.for_model(kind, **shape, **ids)
    config.architectures = [{"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[kind]]
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    tokenizer.save_pretrained(folder)


def random_weights(
    auto_class: Any, source: Any, dtype: torch.dtype, *, new_head: int | None = None, options: Any = None
) -> PreTrainedModel:
    """What `pretrained.load_complete` would return, without reading weights: billions of them in seconds."""
    from dpoctl.models.pretrained import prepared

    head = {} if new_head is None else {"num_labels": new_head}
    config = hf.AutoConfig.from_pretrained(source.folder, **head)
    with no_init_weights():
        model = auto_class.from_config(config, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(1_000_003, generator=draw, dtype=torch.float32) * 0.02  # a prime: rows differ
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                _fill(weight, block)
    return prepared(model)


def _fill(weight: nn.Parameter, block: torch.Tensor) -> None:
    for part in weight.view(-1).split(len(block)):
        part.copy_(block[: len(part)])
