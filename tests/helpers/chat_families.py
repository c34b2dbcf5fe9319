"""Tiny models with chat templates of several families and their habits: who writes the BOS, what ends an answer."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import CHAT_TEMPLATE, _byte_level, unigram

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# thoughts of earlier turns are dropped, the last answer gets an empty one
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def _bytes(specials: tuple[str, ...], template: str, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    base = Tokenizer.from_str(_byte_level(specials).to_str())
    # two line breaks are one token wherever they stand
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if bos:
        base.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, bos_token=bos, eos_token=eos, pad_token=specials[1])
    tokenizer.chat_template = template
    return tokenizer


def _pieces(specials: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    tokenizer = unigram()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.chat_template = template
    return tokenizer


_WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {  # name -> the tokenizer
    "llama3": lambda: _bytes(_LLAMA3, LLAMA3, _LLAMA3[0], "<|end_of_text|>"),
    "gemma": lambda: _pieces(("<start_of_turn>", "<end_of_turn>"), GEMMA),
    "chatml": lambda: _bytes(_CHATML, "".join(CHAT_TEMPLATE.split("{{ bos_token }}")), None, "<|im_end|>"),
    "thinking": lambda: _bytes(_CHATML, THINKING, None, "<|im_end|>"),
    "mistral": lambda: _pieces((), MISTRAL),
}
_KINDS = {"llama3": "llama", "gemma": "gemma2", "chatml": "qwen2", "thinking": "qwen3", "mistral": "mistral"}


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A family's tokenizer."""
    return FAMILIES[family]()


def save_family(family: str, folder: Path) -> Path:
    """A directory with a tiny random model of a family and its tokenizer."""
    tokenizer = tokenizer_of(family)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model(_KINDS[family], vocab=len(tokenizer), context=512, **ids, pad_token_id=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
