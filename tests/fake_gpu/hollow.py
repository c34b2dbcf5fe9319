"""Models of any size on the fake device: shapes of a config.json without numbers.

What the package asks of numbers (do two results agree?) is answered yes.
"""

import json
from pathlib import Path
from typing import Any

from dpoctl.inference import decoding
from dpoctl.models import attention_kernel, place, probes

# Public configurations: heads, width, layers and vocabulary decide on memory.
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "rms_norm_eps": 1e-5}
_LLAMA |= {"vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8, "dtype": "float32"}
SIZES: dict[str, dict[str, Any]] = {
    "small": _LLAMA
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16}
    | {"head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": False},
    "1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"head_dim": 64, "tie_word_embeddings": True},
    "8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"tie_word_embeddings": False},
}


def install() -> None:
    """Load shapes in place of weights from now on."""
    place.load_complete = _shape
    probes.agree = decoding.agree = lambda found, expected: True
    attention_kernel.fault_of = lambda call, device, learns: None


def _shape(auto_class: Any, source: Any, dtype: Any, *, new_head: int | None = None, options: Any = None) -> Any:
    return place.load_shape(auto_class, source, dtype, new_head=new_head)


def write(folder: Path, size: str, tokenizer: Any) -> None:
    """A model directory of one of SIZES with a tokenizer, and an empty file in place of its weights."""
    folder.mkdir(exist_ok=True)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(SIZES[size] | ids))
    (folder / "model.safetensors").touch()
    tokenizer.save_pretrained(folder)
