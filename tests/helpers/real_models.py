"""Directories with the configurations of published models and a small tokenizer: enough for a plan, without weights."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
# the public numbers of each model
CONFIGS = {
    "gpt2-large": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 1280,
        "n_head": 20,
        "n_layer": 36,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "gpt-j-6b": {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "n_embd": 4096,
        "n_head": 16,
        "n_layer": 28,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
        "tie_word_embeddings": False,
    },
    "pythia-2.8b": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "vocab_size": 50304,
        "use_parallel_residual": True,
    },
    "sentiment-roberta-large": {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "vocab_size": 50265,
        "pad_token_id": 1,
        "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
        "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "llama-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "llama-70b": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}


def write(folder: Path, name: str, kind: str = "policy") -> Path:
    """`folder` with the configuration `name`; a `reward` model is one of train-rm on it."""
    config = dict(CONFIGS[name])
    config.setdefault("bos_token_id", 0)
    config.setdefault("eos_token_id", 0)
    if kind == "reward":
        family = config["architectures"][0].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        config |= {"architectures": [f"{family}ForSequenceClassification"], "num_labels": 1, "pad_token_id": 1}
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "reward_shift": 0.0, "reward_scale": 1.0}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `w2` to `w999`."""
    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, 1000)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def text(tokens: int, seed: int = 0) -> str:
    """A text of so many tokens."""
    return " ".join(f"w{2 + (seed * 131 + 7 * i) % 998}" for i in range(tokens))
