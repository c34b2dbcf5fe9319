"""Token ids of prompts, completions and chats, and their text, for the tests of encoding."""

from functools import cache

from dpoctl.data.readers import Rows
from dpoctl.data.tokens import (
    bos_length,
    encode_completion,
    encode_prompt,
)
from helpers.tokenizer_families import byte_level_bpe, chat, unigram, word_piece

FAMILIES = {
    "bpe": byte_level_bpe,
    "unigram-first": lambda: unigram("first"),
    "unigram-always": lambda: unigram("always"),
    "wordpiece": word_piece,
    "chat": chat,
}


LOSSLESS = ("bpe", "unigram-first", "unigram-always", "chat")


build = cache(lambda family: FAMILIES[family]())


def make_rows(*rows: dict) -> Rows:
    return Rows("data.jsonl", list(rows), list(range(1, len(rows) + 1)), {})


def both(tokenizer, prompt, completion, finished=False):
    prompt_ids = encode_prompt(tokenizer, prompt)
    return prompt_ids, encode_completion(tokenizer, prompt, completion, prompt_ids, finished=finished)


def words(tokenizer, ids) -> str:
    """The text of ids, a BOS that the tokenizer adds left out."""
    return tokenizer.decode(ids[bos_length(tokenizer) :] if ids[:1] == [tokenizer.bos_token_id] else ids)


QUESTION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "is the film good?"}]


def chat_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)
