"""Text to token ids: prompts, the completions that follow them, and whole texts.

Two things easily go wrong here. A completion tokenised alone differs from one that follows its prompt: sentencepiece
prepends a word marker, and tokens may merge across the boundary. And text that spells a special token
("<|endoftext|>") would become that token. So a completion's tokens are those that prompt and completion have together,
after the prompt's; and text stays text: the string of a special token is cut after its first character before the
tokenizer sees it. Two strings are read as the tokens that they spell: a BOS that opens a text, an EOS that ends it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | list[dict]  # plain text, or chat messages {"role", "content"}

_CUT = "\udc00"  # marks a cut inside a special token's string; a lone surrogate, which valid text never contains
_CHUNK = 1000  # texts per call of the tokenizer, which holds offsets and masks of all texts of a call
_PROBE = "b"
_INTERNED: dict[int, int] = {}  # id -> the one int object used for it

REWARD_PAD = "<|pad|>"  # the pad token of a reward model's tokenizer, where the policy's tokenizer pads with its EOS


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """16 hex digits over what determines the ids of a text: vocabulary, merges, normalisation, BOS, EOS, chat template.

    Padding and truncation are left out: they differ between stages, and a reward model's tokenizer has a pad token
    that the policy's lacks.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        content = {key: parts[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")}
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != REWARD_PAD]
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content |= {"prefix": _prefix(tokenizer), "eos": tokenizer.eos_token_id, "chat": tokenizer.chat_template}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Text) -> list[int]:
    """Ids of a prompt: a BOS iff the tokenizer adds one or the text begins with it, then the text's.

    Messages are rendered by the chat template up to where the assistant's answer begins; the template alone decides on
    the BOS. Raises InputError where there is no template, or it refuses the messages.
    """
    return encode_prompts(tokenizer, [prompt])[0]


def encode_completion(
    tokenizer: "PreTrainedTokenizerBase", prompt: Text, completion: Text, prompt_ids: list[int], *, finished: bool
) -> list[int]:
    """Ids of a completion as they follow `prompt_ids`, with one EOS iff `finished` or the text ends in the EOS.

    Raises InputError where the tokenizer has no EOS, or no chat template for messages.
    """
    return encode_completions(tokenizer, [prompt], [completion], [prompt_ids], [finished])[0]


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, finished: bool = True) -> list[int]:
    """A BOS iff the tokenizer adds one, the text's ids, and an EOS iff `finished` or the text ends in it."""
    return encode_texts(tokenizer, [text], [finished])[0]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Text], where: Callable[[int], str] | None = None
) -> list[list[int]]:
    """`encode_prompt` of many; `where(i)` names the place of prompt i in an error."""
    facts = _facts(tokenizer)
    heads: list[list[int]] = []
    texts: list[str] = []
    for i, prompt in enumerate(prompts):
        with _placed(where, i):
            head, text = _prompt_text(facts, prompt)
        heads.append(head)
        texts.append(text)
    return [head + ids for head, ids in zip(heads, _tokens(facts, texts), strict=True)]


def encode_completions(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Text],
    completions: Sequence[Text],
    prompt_ids: Sequence[list[int]],
    finished: Sequence[bool],
    where: Callable[[int], str] | None = None,
) -> list[list[int]]:
    """`encode_completion` of many; `where(i)` names the place of completion i in an error."""
    facts, eos = _facts(tokenizer), eos_id(tokenizer)
    heads: list[list[int]] = []
    joined: list[str] = []  # each prompt with its completion
    texts: list[str] = []
    ended: list[bool] = []
    for i, (prompt, completion, ends) in enumerate(zip(prompts, completions, finished, strict=True)):
        with _placed(where, i):
            head, before = _prompt_text(facts, prompt)
            if isinstance(prompt, list):
                text, closed = _chat_completion(facts, prompt, completion, before, ends)
            elif isinstance(completion, list):
                raise InputError("the completion is a list of messages, but the prompt is a string")
            else:
                text, closed = _close(facts, completion)
                text = _as_text(facts, text)
        heads.append(head)
        joined.append(before + text)
        texts.append(text)
        ended.append(ends or closed)
    results: list[list[int]] = []
    merged: list[int] = []
    for i, (head, ids) in enumerate(zip(heads, _tokens(facts, joined), strict=True)):
        ids, start = head + ids, len(prompt_ids[i])
        results.append(ids[start:])
        if ids[:start] != prompt_ids[i] or (texts[i] and len(ids) == start):
            merged.append(i)  # a token spans the boundary: the completion is tokenised as a continuation
    for i, ids in zip(merged, _continuations(facts, [texts[i] for i in merged]), strict=True):
        results[i] = ids
    return [ids + [eos] if ends else ids for ids, ends in zip(results, ended, strict=True)]


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], finished: Sequence[bool]
) -> list[list[int]]:
    """`encode_text` of many."""
    facts, eos = _facts(tokenizer), eos_id(tokenizer)
    heads, bodies, ended = [], [], []
    for text, ends in zip(texts, finished, strict=True):
        head, body = _open(facts, text)
        body, closed = _close(facts, body)
        heads.append(head)
        bodies.append(_as_text(facts, body))
        ended.append(ends or closed)
    rows = zip(heads, _tokens(facts, bodies), ended, strict=True)
    return [head + ids + [eos] if ends else head + ids for head, ids, ends in rows]


def interned(ids: list[int]) -> list[int]:
    """The same ids as interned ints, so that a list takes 8 bytes per token instead of 36."""
    return list(map(_INTERNED.setdefault, ids, ids))


def eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the EOS. Raises InputError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json")
    return tokenizer.eos_token_id


def bos_length(tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many ids the tokenizer prepends to a text: 1 where it adds a BOS, else mostly 0."""
    return len(_prefix(tokenizer))


def count_special(tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Sequence[Text]]) -> int:
    """How many rows contain a text that spells a special token, other than a BOS first or an EOS last.

    Such a string is read as plain text, which may not be what its author meant.
    """
    facts = _facts(tokenizer)
    return sum(any(_spells_special(facts, text) for text in row) for row in rows)


def _spells_special(facts: "_Facts", value: Text) -> bool:
    texts = [value] if isinstance(value, str) else [message["content"] for message in value]
    return any(_CUT in _as_text(facts, _close(facts, _open(facts, text)[1])[0]) for text in texts)


# --- a tokenizer's properties ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    tokenizer: "PreTrainedTokenizerBase"
    bos: str | None
    bos_id: int | None
    eos: str | None
    special: re.Pattern[str] | None  # the strings of special tokens
    prefix: list[int]  # what the tokenizer prepends to a text
    leads: list[tuple[str, list[int]]]  # texts after which a continuation is tokenised, and their ids


def _facts(tokenizer: "PreTrainedTokenizerBase") -> _Facts:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = {text for text in special | set(tokenizer.all_special_tokens) if len(text) > 1 and not text.isspace()}
    longest_first = sorted(special, key=lambda text: (-len(text), text))
    pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None
    ends = (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token)
    return _Facts(tokenizer, *ends, pattern, _prefix(tokenizer), _leads(tokenizer))


def _prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    with_specials, ids = tokenizer(_PROBE)["input_ids"], _raw(tokenizer, [_PROBE])[0]
    starts = (n for n in range(len(with_specials)) if with_specials[n : n + len(ids)] == ids)
    return with_specials[: next(starts, 0)]


def _leads(tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, list[int]]]:
    """Texts whose ids can be removed from those of lead + continuation, which then differ from the continuation alone.

    Empty for tokenizers that prepend nothing to a text.
    """
    alone = _raw(tokenizer, [_PROBE])[0]
    leads = []
    for lead in ("\n", "=", "."):
        ids, joined = _raw(tokenizer, [lead, lead + _PROBE])
        known = tokenizer.unk_token_id not in ids  # consecutive unknown characters become one token
        if ids and known and joined[: len(ids)] == ids and joined[len(ids) :] != alone:
            leads.append((lead, ids))
    return leads


# --- preparing text for the tokenizer ------------------------------------------------------------------------------


def _open(facts: _Facts, text: str) -> tuple[list[int], str]:
    """(the ids before a text, the text without a BOS string at its start)."""
    if facts.bos and text.startswith(facts.bos):
        first = [] if facts.bos_id is None else [facts.bos_id]
        return facts.prefix or first, text[len(facts.bos) :]
    return facts.prefix, text


def _close(facts: _Facts, text: str) -> tuple[str, bool]:
    """(the text without an EOS string at its end, whether it had one)."""
    if facts.eos and text.endswith(facts.eos):
        return text[: -len(facts.eos)], True
    return text, False


def _as_text(facts: _Facts, text: str) -> str:
    """The text with a cut inside every special token's string."""
    if facts.special is None:
        return text
    return facts.special.sub(lambda match: match[0][0] + _CUT + match[0][1:], text)


def _prompt_text(facts: _Facts, prompt: Text) -> tuple[list[int], str]:
    """(the ids before a prompt, its text)."""
    if isinstance(prompt, str):
        head, text = _open(facts, prompt)
        return head, _as_text(facts, text)
    return [], _render(facts, prompt, answer_next=True)


def _chat_completion(
    facts: _Facts, prompt: list[dict], completion: Text, before: str, finished: bool
) -> tuple[str, bool]:
    """(what the template renders after `before`, the rendered prompt, without a final EOS; whether the text had one).

    A truncated answer stops at its last character, before the template's end of turn. Where the template renders the
    prompt differently once it is answered (some insert an empty thought), the answer follows the prompt as it is
    rendered for generation.
    """
    answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    content, closed = _close(facts, answer[-1]["content"])
    rendered = _render(facts, [*prompt, *answer[:-1], {**answer[-1], "content": content}], answer_next=False)
    content = _as_text(facts, content)
    shown = content.strip()  # most templates strip it
    at = rendered.rfind(shown) if shown else -1
    ends = finished or closed
    if rendered.startswith(before) and (ends or at >= len(before)):
        text = rendered[len(before) :] if ends else rendered[len(before) : at + len(shown)]
    elif len(answer) > 1:
        raise InputError("the chat template renders the prompt differently once several messages answer it")
    else:
        text = content + rendered[at + len(shown) :] if ends and at >= 0 else content
    head, eos, rest = text.rpartition(facts.eos) if facts.eos else ("", "", text)
    return (head if eos and not rest.strip() else text), closed


def _render(facts: _Facts, messages: list[dict], *, answer_next: bool) -> str:
    tokenizer = facts.tokenizer
    if tokenizer.chat_template is None:
        raise InputError(
            "messages, but the tokenizer has no chat template",
            hint="give prompt and answers as strings, or a model with a chat_template in its tokenizer",
        )
    messages = [
        {key: _as_text(facts, value) if isinstance(value, str) else value for key, value in message.items()}
        for message in messages
    ]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer's chat template refuses the messages: {error}") from None


@contextmanager
def _placed(where: Callable[[int], str] | None, i: int) -> Iterator[None]:
    """Prefix an InputError inside the block with the place of row i."""
    try:
        yield
    except InputError as error:
        if where is None:
            raise
        raise InputError(f"{where(i)}: {error.message}", error.hint) from None


# --- text to ids -----------------------------------------------------------------------------------------------------


def _raw(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        encoded = tokenizer(
            chunk, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
        )
        ids += map(interned, encoded["input_ids"])
    return ids


def _tokens(facts: _Facts, texts: list[str]) -> list[list[int]]:
    """Ids of texts; the text after a cut is tokenised as a continuation."""
    pieces = [text.split(_CUT) for text in texts]
    ids = _raw(facts.tokenizer, [first for first, *_ in pieces])
    cut = [i for i, (_, *rest) in enumerate(pieces) if rest]
    for i, rest in zip(cut, _continuations(facts, [_CUT.join(pieces[i][1:]) for i in cut]), strict=True):
        ids[i] = ids[i] + rest
    return ids


def _continuations(facts: _Facts, texts: list[str]) -> list[list[int]]:
    """Ids of texts that continue other text: without the word marker or space prepended to a text's start."""
    owners, pieces = [], []
    for i, text in enumerate(texts):
        parts = [part for part in text.split(_CUT) if part]
        owners += [i] * len(parts)
        pieces += parts
    found: dict[int, list[int]] = {}
    for lead, lead_ids in [*facts.leads, ("", [])]:  # the last lead, the empty text, fits the rest
        left = [n for n in range(len(pieces)) if n not in found]
        for n, joined in zip(left, _raw(facts.tokenizer, [lead + pieces[n] for n in left]), strict=True):
            if joined[: len(lead_ids)] == lead_ids:
                found[n] = joined[len(lead_ids) :]
    ids: list[list[int]] = [[] for _ in texts]
    for n, i in enumerate(owners):
        ids[i] += found[n]
    return ids
