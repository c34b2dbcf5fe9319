"""Small decoders with random weights, one for each architecture that the tests compare."""

import torch
import transformers as hf
from transformers import PreTrainedModel

ARCHITECTURES = {  # kind -> config class, model class, options beside the common ones
    "neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, {}),
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {"num_key_value_heads": 2}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}),
    # a window shorter than the texts: its cache layers are of another kind
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": 6}),
    "gemma2": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    # layers with and without a window take turns
    "gemma3": (
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def tiny_model(
    kind: str,
    *,
    vocab: int = 61,
    context: int = 64,
    width: int = 32,
    heads: int = 4,
    std: float = 0.2,
    **ids: int | None,
) -> PreTrainedModel:
    """A decoder of two layers in eval mode, without dropout; `ids` are the special tokens of its config.

    A wide initialisation (`std`) keeps greedy choices far from ties, so that float rounding does not turn them.
    """
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_layer": 2, "n_head": heads, "n_embd": width, "vocab_size": vocab, "n_positions": context}
        dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **dropout, initializer_range=std, **ids)).eval()
    if kind == "bloom":
        return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=vocab, hidden_size=width, n_layer=2, n_head=heads)).eval()
    config, model, options = ARCHITECTURES[kind]
    shape = {"hidden_size": width, "intermediate_size": width * 3 // 2, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": heads, "vocab_size": vocab, "max_position_embeddings": context}
    return model(config(**shape, initializer_range=std, **options, **ids)).eval()
