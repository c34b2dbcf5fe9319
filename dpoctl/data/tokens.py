"""Text to token ids, for one tokenizer: whole texts, texts that continue others, and the strings of special tokens.

Two things easily go wrong here. A completion tokenised alone differs from one that follows its prompt: sentencepiece
prepends a word marker, and tokens may merge across the boundary. And text that spells a special token
("<|endoftext|>") would become that token. So text stays text: the string of a special token is cut after its first
character before the tokenizer sees it. Two strings are read as the tokens that they spell: a BOS that opens a text, an
EOS that ends it.
"""

import hashlib
import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "\udc00"  # marks a cut inside a special token's string; a lone surrogate, which valid text never contains
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


def interned(ids: list[int]) -> list[int]:
    """The same ids as interned ints, so that a list takes 8 bytes per token instead of 36."""
    return list(map(_INTERNED.setdefault, ids, ids))


class Vocabulary:
    """A tokenizer and what it prepends to a text.

    `prefix`: the ids that the tokenizer prepends, one BOS or none. `bos`, `eos`: the strings of those tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.bos, self.bos_id, self.eos = tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token
        self.prefix = _prefix(tokenizer)
        self.leads = _leads(tokenizer)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = {text for text in special | set(tokenizer.all_special_tokens) if len(text) > 1 and not text.isspace()}
        longest_first = sorted(special, key=lambda text: (-len(text), text))
        self.special = re.compile("|".join(map(re.escape, longest_first))) if special else None

    # --- strings

    def open(self, text: str) -> tuple[list[int], str]:
        """(the ids before a text, the text without a BOS string at its start)."""
        if self.bos and text.startswith(self.bos):
            first = [] if self.bos_id is None else [self.bos_id]
            return self.prefix or first, text[len(self.bos) :]
        return self.prefix, text

    def close(self, text: str) -> tuple[str, bool]:
        """(the text without an EOS string at its end, whether it had one)."""
        if self.eos and text.endswith(self.eos):
            return text[: -len(self.eos)], True
        return text, False

    def as_text(self, text: str) -> str:
        """The text with a cut inside every special token's string."""
        if self.special is None:
            return text
        return self.special.sub(lambda match: match[0][0] + CUT + match[0][1:], text)

    def spells_special(self, text: str) -> bool:
        """Whether a text spells a special token, other than a BOS first or an EOS last."""
        return CUT in self.as_text(self.close(self.open(text)[1])[0])

    # --- ids

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts; the text after a cut is tokenised as a continuation."""
        pieces = [text.split(CUT) for text in texts]
        ids = _raw(self.tokenizer, [first for first, *_ in pieces])
        cut = [i for i, (_, *rest) in enumerate(pieces) if rest]
        for i, rest in zip(cut, self.continuations([CUT.join(pieces[i][1:]) for i in cut]), strict=True):
            ids[i] = ids[i] + rest
        return ids

    def continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue other text: without the word marker or space prepended to a text's start."""
        owners, pieces = [], []
        for i, text in enumerate(texts):
            parts = [part for part in text.split(CUT) if part]
            owners += [i] * len(parts)
            pieces += parts
        found: dict[int, list[int]] = {}
        for lead, lead_ids in [*self.leads, ("", [])]:  # the last lead, the empty text, fits the rest
            left = [n for n in range(len(pieces)) if n not in found]
            for n, joined in zip(left, _raw(self.tokenizer, [lead + pieces[n] for n in left]), strict=True):
                if joined[: len(lead_ids)] == lead_ids:
                    found[n] = joined[len(lead_ids) :]
        ids: list[list[int]] = [[] for _ in texts]
        for n, i in enumerate(owners):
            ids[i] += found[n]
        return ids


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


def _raw(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        encoded = tokenizer(
            chunk, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
        )
        ids += map(interned, encoded["input_ids"])
    return ids
