"""Token ids of prompts, completions and chats, and their text, for the tests of encoding."""

from functools import cache

from dpoctl.data.chats import Prompt
from dpoctl.data.codec import Codec
from dpoctl.data.readers import Rows
from dpoctl.data.stored import text_key
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


def encode_prompt(tokenizer, prompt) -> list[int]:
    [ids] = Codec(tokenizer).encode_prompts([Prompt(prompt)])
    return ids


def encode_text(tokenizer, text, finished=True) -> list[int]:
    [ids] = Codec(tokenizer).encode_texts([text], [finished])
    return ids


def both(tokenizer, prompt, completion, finished=False, model_ends=()):
    """(prompt ids, completion ids)."""
    codec, whole = Codec(tokenizer, model_ends), Prompt(prompt)
    [prompt_ids] = codec.encode_prompts([whole])
    [ids] = codec.encode_completions([whole], [completion], [prompt_ids], [finished])
    return prompt_ids, ids


def texts_of(row: dict) -> list[str]:
    """The field `texts` that belongs to a row with token ids of its texts."""
    prompt, ids, names = Prompt(row["prompt"]), row["prompt_ids"], ("completion", "chosen", "rejected")
    return [text_key(prompt, ids, row[name], row[f"{name}_ids"]) for name in names if f"{name}_ids" in row]


def words(tokenizer, ids) -> str:
    """The text of ids, a BOS that the tokenizer adds left out."""
    return tokenizer.decode(ids[Codec(tokenizer).bos_length :] if ids[:1] == [tokenizer.bos_token_id] else ids)


QUESTION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "is the film good?"}]


def chat_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)
