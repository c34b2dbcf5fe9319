"""Random models of many decoder architectures, small enough to train in a test, over one tokenizer.

Windows, chunks and blocks are 8 tokens, shorter than the texts. The embedding has more rows than the tokenizer has ids,
as padded vocabularies do. Norms and biases are random too, so that one that is ignored changes the numbers.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EMBEDDINGS = 384
SPAN = 8  # tokens of a window, chunk or block
CONTEXT = 160
END = "<|end|>"
WORDS = (
    "river stone bread window garden letter engine winter market candle bridge forest silver morning island "
    "teacher picture number doctor kitchen village harbour weather mountain"
).split()

_OLD = {"vocab_size": EMBEDDINGS, "hidden_size": 32, "initializer_range": 0.2}  # alibi, multi-query
_BASE = _OLD | {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_BASE |= {"max_position_embeddings": CONTEXT}
_GROUPED = _BASE | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 8}
_GPT = {"vocab_size": EMBEDDINGS, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
_GPT |= {"initializer_range": 0.2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SSM = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": SPAN}
_WINDOW = {"sliding_window": SPAN}
_DELTA_RULE = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_DELTA_RULE |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MIXED_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 3.0, 6.0, 9.0],
    "original_max_position_embeddings": 24,
}

# name -> (transformers' model type, configuration)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # dense
    "llama": ("llama", _HEADS),
    "llama-tied": ("llama", _HEADS | {"tie_word_embeddings": True, "pad_token_id": -1}),
    "qwen2-window": ("qwen2", _GROUPED | _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", _HEADS),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", _HEADS | _WINDOW | {"query_pre_attn_scalar": 8}),
    "gemma2-small-logits": ("gemma2", _HEADS | _WINDOW | {"query_pre_attn_scalar": 8, "initializer_range": 0.02}),
    "gemma3": (
        "gemma3_text",
        _HEADS | _WINDOW | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": ("mistral", _HEADS | _WINDOW),
    "phi3": ("phi3", _GROUPED | _WINDOW),
    "phi3-longrope": ("phi3", _GROUPED | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 24}),
    "phi": ("phi", _BASE | {"partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", _GROUPED),
    "granite": ("granite", _GROUPED | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "cohere2": ("cohere2", _GROUPED | _WINDOW | {"logit_scale": 0.25}),
    "stablelm": ("stablelm", _GROUPED),
    "starcoder2": ("starcoder2", _GROUPED | _WINDOW),
    "exaone4": ("exaone4", _GROUPED | _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "glm4": ("glm4", _HEADS),
    "smollm3": ("smollm3", _GROUPED),
    "modernbert-decoder": (
        "modernbert-decoder",
        _BASE | {"local_attention": SPAN, "cls_token_id": 0, "sep_token_id": 0},
    ),
    # older ones: learned positions, ALiBi, local layers
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),
    "codegen": ("codegen", _GPT | {"n_ctx": CONTEXT, "rotary_dim": 4}),
    "neox": ("gpt_neox", _BASE),
    "gpt-neo": (
        "gpt_neo",
        _OLD
        | {"num_layers": 2, "num_heads": 4, "intermediate_size": 48, "max_position_embeddings": CONTEXT}
        | {"attention_types": [[["global", "local"], 1]], "window_size": SPAN},
    ),
    "opt": (
        "opt",
        {"vocab_size": EMBEDDINGS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": 16,
            "init_std": 0.2,
            "do_layer_norm_before": False,
        },
    ),
    "falcon-alibi": ("falcon", _OLD | {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    "bloom": ("bloom", _OLD | {"n_layer": 2, "n_head": 4}),
    # mixtures of experts
    "mixtral": (
        "mixtral",
        _HEADS | _WINDOW | _LOCAL_EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        _GROUPED
        | _EXPERTS
        | _WINDOW
        | {"shared_expert_intermediate_size": 24, "use_sliding_window": True}
        | {"max_window_layers": 1},
    ),
    "qwen3-moe": ("qwen3_moe", _HEADS | _EXPERTS | {"decoder_sparse_step": 1}),
    "phimoe": ("phimoe", _GROUPED | _LOCAL_EXPERTS | _WINDOW),
    "olmoe": ("olmoe", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "gpt_oss",
        _HEADS | _LOCAL_EXPERTS | _WINDOW | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _BASE
        | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "v_head_dim": 8}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    ),
    "llama4": (
        "llama4_text",
        _HEADS
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": SPAN}
        | {"no_rope_layers": [1, 0], "interleave_moe_layer_step": 1},
    ),
    # recurrent and hybrid
    "mamba": ("mamba", _OLD | {"state_size": 8, "num_hidden_layers": 2}),
    "mamba2": (
        "mamba2",
        _OLD
        | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "num_hidden_layers": 2, "chunk_size": SPAN},
    ),
    "falcon-h1": ("falcon_h1", _HEADS | _SSM | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_n_groups": 1}),
    "jamba": (
        "jamba",
        _GROUPED
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "bamba": ("bamba", _GROUPED | _SSM | {"attn_layer_indices": [1], "mamba_n_heads": 8}),
    "granite-hybrid": (
        "granitemoehybrid",
        _GROUPED
        | _SSM
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"shared_intermediate_size": 16, "mamba_n_heads": 8, "logits_scaling": 2.0},
    ),
    "zamba2": (
        "zamba2",
        _GROUPED
        | {"layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16, "mamba_d_state": 8, "mamba_ngroups": 1}
        | {"n_mamba_heads": 8, "chunk_size": SPAN, "num_mem_blocks": 1},
    ),
    "recurrent-gemma": (
        "recurrent_gemma",
        _OLD
        | {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32}
        | {"attention_window_size": SPAN},
    ),
    "lfm2": ("lfm2", _GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "qwen3-next": (
        "qwen3_next",
        _HEADS | _MIXED_LAYERS | _DELTA_RULE | _EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "qwen3.5": ("qwen3_5_text", _HEADS | _MIXED_LAYERS | _DELTA_RULE),
    "minimax": (
        "minimax",
        _HEADS
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"]}
        | {"block_size": SPAN},
    ),
}


@lru_cache(maxsize=1)
def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose EOS has id 0."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=EMBEDDINGS - 20, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


def make_model(name: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model in eval mode and float32; `options` replace some of its configuration."""
    kind, configuration = ARCHITECTURES[name]
    special = {"bos_token_id": 0, "eos_token_id": 0}
    if kind != "codegen":  # its configuration has no such field
        special["pad_token_id"] = 0
    config = AutoConfig.for_model(kind, **special | configuration | options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=noise))
    return model.eval()


def save(folder: Path, name: str, *, perturbed: bool = False, **options: Any) -> Path:
    """A model's directory; `perturbed` adds noise to every weight."""
    model = make_model(name, **options)
    if perturbed:
        noise = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=noise))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
