"""What vLLM needs to apply a peft adapter to its base while it runs."""

import json
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...models.hub import is_adapter, resolve_base
from ...outputs import adapter_base
from ...outputs.adapter_base import Base

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # sizes that vLLM's kernels have
_MERGE = "dpoctl merge ADAPTER --out DIR merges it; use DIR then"
# parts of adapter_config.json that vLLM does not apply, or refuses only after the model is loaded
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "biases of its layers",
    "rank_pattern": "different ranks",
    "alpha_pattern": "different alphas",
    "layer_replication": "replicated layers",
    "target_parameters": "parameters (target_parameters)",
}


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter's folder, its base, and the rank that vLLM reserves for it."""

    folder: str
    base: Base
    rank: int

    def request(self) -> tuple[str, int, str]:
        """Of a vllm.lora.request.LoRARequest: name, number and path of the adapter."""
        return "adapter", 1, str(Path(self.folder).absolute())


def adapter_plan(path: str, folder: str) -> AdapterPlan | None:
    """How vLLM applies the adapter in a folder; None for a complete model.

    Raises InputError for an adapter that it cannot apply, and for a base that is not found or has other weights.
    """
    if not is_adapter(folder):
        return None
    base = adapter_base.find(folder)
    adapter_base.check(folder, base.path, resolve_base(path, base.path, base.revision))
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        kind, rank = config["peft_type"], int(config["r"])
    except (OSError, ValueError, KeyError, TypeError):
        hint = "give what peft's save_pretrained wrote"
        raise InputError(f"{path}: adapter_config.json cannot be read as a LoRA's", hint) from None
    held = [name for key, name in _UNSUPPORTED.items() if config.get(key)]
    held += [] if kind == "LORA" else [f"an adapter of type {kind}"]
    held += [f"biases ({config['bias']})"] if config.get("bias", "none") != "none" else []
    held += [f"rank {rank}"] if rank > _RANKS[-1] else []
    if held:
        raise InputError(f"{path}: vLLM cannot apply this adapter: it has {', '.join(held)}", _MERGE)
    return AdapterPlan(folder, base, next(size for size in _RANKS if size >= rank))
