"""Small tokenizers of each family, trained in the test on a few sentences."""

import json
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The film was great and the acting was unbelievable, believe me.",
    "A dull, dull story; I would not watch it again. It was 10 times too long!",
    "Question: is the ending good?\n\nAnswer: the ending is good, and the music is lovely.",
    "Human: hello there\n\nAssistant: hello, how are you doing today?",
    "Ein schöner Film über Käse, café and naïve people.",
    "The end.\n\n",
] * 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'function' %}{{ raise_exception('no functions here') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache
def _byte_level(specials: tuple[str, ...], vocabulary: int = 420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level_bpe(**kwargs) -> PreTrainedTokenizerFast:
    """GPT-2's family: every byte has a token, no BOS is added, one token is BOS, EOS and padding."""
    end = "<|endoftext|>"
    kwargs = {"bos_token": end, "eos_token": end, "pad_token": end, **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level((end,)), **kwargs)


def chat(**kwargs) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template that writes the BOS itself; a turn's end is the EOS."""
    specials = ("<s>", "<|im_start|>", "<|im_end|>")
    base = Tokenizer.from_str(_byte_level(specials).to_str())
    base.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    kwargs = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **kwargs)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def unigram(prepend_scheme: str = "first", byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """Sentencepiece's Unigram, with Llama's habits: a word mark and a BOS before the text, bytes for the unknown.

    Without `byte_fallback`, unknown characters in a row are one <unk>.
    """
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    vocab = [*map(tuple, pieces[:3]), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *map(tuple, pieces[3:])]
    tokenizer.model = models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's family: lower case, words and ##pieces; [CLS] before a text and [SEP], its EOS, after it."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )
