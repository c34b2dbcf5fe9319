"""What --dry-run says of an engine other than this package's own."""

from typing import Any

from ..models.ledger import Ledger
from ..models.load import context_length
from . import memory
from .memory import Phase, Target


def engine_lines(config: Any) -> dict[str, Any]:
    """The lines of a plan that tell of the engine; none for this package's own."""
    if config.engine == "server":
        return {"engine": f"server {config.base_url}"}
    if config.engine == "vllm":
        each = config.tensor_parallel_size
        return {"engine": "vllm" + (f", {each} GPUs for one copy of the model" if each > 1 else "")}
    return {}


def engine_phases(config: Any, counted: Ledger, target: Target, model: str) -> list[Phase]:
    """What an engine takes of a device: nothing of it where a server generates.

    vLLM takes --gpu-memory-utilization of a GPU whatever the model: what the weights leave is the cache of keys and
    values, which has to hold one text of the greatest length. What it takes of a processor's memory is not estimated.
    """
    if config.engine == "server" or not target.gpu:
        return []
    gpus = config.tensor_parallel_size
    policy = memory.open_frozen(counted, model, "policy", config.revision, target)
    weights = policy.size // gpus
    longest = config.max_model_len or context_length(policy.model) or 0
    left = int(config.gpu_memory_utilization * (target.hardware.memory or 0)) - weights
    cache = max(left, longest * _bytes_of_a_token(policy.model, target) // gpus)
    return [Phase("generation", {"weights": weights, "vLLM's cache": cache})]


def _bytes_of_a_token(model: Any, target: Target) -> int:
    """Bytes of the keys and values of a token in all layers, with a full cache in each."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kept * width * target.dtype.itemsize
