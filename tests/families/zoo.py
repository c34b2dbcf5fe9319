"""Model families in miniature: random weights, and the habits of each one's tokenizer, template and generation_config.

A family with a chat model and a base model has both. End tokens have a raised probability, so that samples end, and
with each of them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from families import templates

CONTEXT = 256
SENTENCES = [
    "What do you think of the river? It is old and rather quiet.",
    "Tell me about the kettle. It is blue, and it works well!",
    "Is the garden good? Nobody knows; ask again tomorrow.",
    "Describe the violin in one sentence. Sorry, I can't say: it isn't mine.",
    "Be brief. It costs 10 times too much.\n\nYes, I like it very much.",
    "user assistant system model tool café naïve 日本語 <think>\n\n</think>\n\n",
    '{"name": "get_weather", "arguments": {"city": "Ghent"}}',
] * 4
_WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SHAPE |= {"max_position_embeddings": CONTEXT, "initializer_range": 0.15}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """What a checkpoint of a family consists of; `ends` are the end tokens of its generation_config."""

    tokenizer: Callable[[], Any]
    kind: str
    config: dict[str, Any]
    ends: tuple[str, ...]
    padded: int = 0  # rows of the embedding beyond the tokenizer's ids
    answer_end: str = ""  # what the template writes after an answer, where it has a template


def _byte_level(specials: tuple[str, ...], bos: str | None = None, words: bool = True) -> Tokenizer:
    """Byte-level BPE, as Llama-3, Qwen, NeoX and GPT-2 have it; with `words`, runs of line breaks are one token."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)
    split = pre_tokenizers.Split(_WORDS, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain]) if words else plain
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 90 + len(specials),
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _with_bos(tokenizer, bos)


def _sentence_piece(specials: tuple[str, ...], bos: str | None, marks_start: bool, **added: bool) -> Tokenizer:
    """Sentencepiece's BPE with bytes for the unknown; `marks_start` prepends a word marker to a text (Llama-2's habit).

    `added`: how the special tokens take the blanks around them.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if marks_start else [replace])
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*specials, *every], show_progress=False, max_token_length=5
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece spans two words
    tokenizer.train_from_iterator(SENTENCES, trainer)
    parts = json.loads(tokenizer.to_str())
    parts["pre_tokenizer"] = None
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    if added:
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, **added) for text in specials[3:]])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if marks_start else steps)
    return _with_bos(tokenizer, bos)


def _with_bos(tokenizer: Tokenizer, bos: str | None) -> Tokenizer:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _fast(tokenizer: Tokenizer, template: str | None = None, **special: str) -> Any:
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=CONTEXT, **special
    )
    fast.chat_template = template
    return fast


_LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_PHI3 = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


def _llama3(template: str | None, eos: str) -> Any:
    return _fast(_byte_level(_LLAMA3, _LLAMA3[0]), template, bos_token=_LLAMA3[0], eos_token=eos)


def _chatml(template: str, eos: str) -> Any:
    return _fast(_byte_level(_CHATML), template, eos_token=eos, pad_token="<|endoftext|>")


def _gemma(template: str | None) -> Any:
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return _fast(_sentence_piece(_GEMMA, "<bos>", marks_start=False), template, **special)


def _phi3() -> Any:
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    return _fast(_sentence_piece(_PHI3, None, marks_start=True, rstrip=True), templates.PHI3, **special)


def _mistral(template: str | None) -> Any:
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _fast(_sentence_piece(("<unk>", "<s>", "</s>"), "<s>", marks_start=True), template, **special)


def _neox() -> Any:
    end = "<|endoftext|>"
    specials = (end, "<|padding|>")
    return _fast(_byte_level(specials, words=False), bos_token=end, eos_token=end, unk_token=end)


def _gpt2() -> Any:
    end = "<|endoftext|>"
    return _fast(_byte_level((end,), words=False), bos_token=end, eos_token=end, unk_token=end)


_LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
_QWEN2 = _GROUPED | {"tie_word_embeddings": True}
_QWEN3 = _GROUPED | {"head_dim": 8, "tie_word_embeddings": True}
_GEMMA2 = _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
_MISTRAL = _GROUPED | {"sliding_window": 32}
_GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": CONTEXT, "initializer_range": 0.15}
_GPT2 |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
FAMILIES: dict[str, Family] = {
    "llama3": Family(
        lambda: _llama3(templates.LLAMA3, "<|eot_id|>"), "llama", _GROUPED, _LLAMA3_ENDS, answer_end="<|eot_id|>"
    ),
    "llama3-base": Family(lambda: _llama3(None, "<|end_of_text|>"), "llama", _GROUPED, ("<|end_of_text|>",)),
    "llama3-dated": Family(
        lambda: _llama3(templates.DATED, "<|eot_id|>"), "llama", _GROUPED, _LLAMA3_ENDS, answer_end="<|eot_id|>"
    ),
    "qwen2.5": Family(
        lambda: _chatml(templates.QWEN2, "<|im_end|>"), "qwen2", _QWEN2, _QWEN_ENDS, padded=40, answer_end="<|im_end|>"
    ),
    "qwen2.5-base": Family(
        lambda: _chatml(templates.QWEN2, "<|endoftext|>"),
        "qwen2",
        _QWEN2,
        ("<|endoftext|>",),
        padded=40,
        answer_end="<|im_end|>",
    ),
    "qwen3": Family(
        lambda: _chatml(templates.QWEN3, "<|im_end|>"), "qwen3", _QWEN3, _QWEN_ENDS, padded=8, answer_end="<|im_end|>"
    ),
    "thinking": Family(
        lambda: _chatml(templates.THINKING, "<|im_end|>"), "qwen2", _QWEN2, _QWEN_ENDS, answer_end="<|im_end|>"
    ),
    "gemma": Family(
        lambda: _gemma(templates.GEMMA), "gemma2", _GEMMA2, ("<eos>", "<end_of_turn>"), answer_end="<end_of_turn>"
    ),
    "gemma-base": Family(lambda: _gemma(None), "gemma2", _GEMMA2, ("<eos>",)),
    "phi3": Family(_phi3, "phi3", _SHAPE, ("<|endoftext|>", "<|assistant|>", "<|end|>"), answer_end="<|end|>"),
    "mistral": Family(lambda: _mistral(templates.MISTRAL), "mistral", _MISTRAL, ("</s>",), answer_end="</s>"),
    "mistral-base": Family(lambda: _mistral(None), "mistral", _MISTRAL, ("</s>",)),
    "neox": Family(_neox, "gpt_neox", _SHAPE | {"rotary_pct": 0.25}, ("<|endoftext|>",), padded=24),
    "gpt2": Family(_gpt2, "gpt2", _GPT2, ("<|endoftext|>",)),
}
CHATS = [name for name, family in FAMILIES.items() if family.answer_end]


@cache
def tokenizer_of(name: str) -> Any:
    """A family's tokenizer."""
    return FAMILIES[name].tokenizer()


def end_ids(name: str) -> list[int]:
    """The end tokens of a family's generation_config."""
    return tokenizer_of(name).convert_tokens_to_ids(list(FAMILIES[name].ends))


def stops(name: str, prompt: str | list) -> set[int]:
    """Where sampling stops: at these, the EOS, and in a chat where the template ends an answer."""
    tokenizer = tokenizer_of(name)
    found = {*end_ids(name), tokenizer.eos_token_id}
    return found if isinstance(prompt, str) else found | {tokenizer.convert_tokens_to_ids(FAMILIES[name].answer_end)}


def save(name: str, folder: Path, seed: int) -> Path:
    """Write a checkpoint of a family, with random weights of a seed."""
    family, tokenizer, ends = FAMILIES[name], tokenizer_of(name), end_ids(name)
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    config = hf.AutoConfig.for_model(family.kind, vocab_size=len(tokenizer) + family.padded, **family.config, **ids)
    model = hf.AutoModelForCausalLM.from_config(config)
    _raise_ends(model, sorted(stops(name, []) if family.answer_end else stops(name, "")))
    model.generation_config = hf.GenerationConfig(**ids, do_sample=True, temperature=0.7, top_p=0.8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _raise_ends(model: Any, ends: list[int]) -> None:
    """Give each end token a probability of a few percent, by a direction that all states share."""
    body, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    body[:, 0], head[:, 0] = 2.0, 0.0
    if body is head:
        head[:, 0] = 2.0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))  # a norm that is ignored changes the numbers
    probe = torch.arange(20, 60)[None]
    state = model.base_model(input_ids=probe).last_hidden_state[0, :, 0].mean().item()
    logps = model(input_ids=probe).logits[0].log_softmax(-1).mean(0)
    for end in ends:
        head[end, 0] += (math.log(0.08) - logps[end].item()) / state
