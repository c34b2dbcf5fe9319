"""What scorers read: rows as text, and as token ids of prompt and completion."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import log
from ..data.encode import truncate
from ..data.tokens import encode_completion, encode_prompt, encode_text, fingerprint
from ..models.load import context_length

_SHOWN = 60  # characters of a text in messages


def completion_of(row: dict) -> str:
    """The text of a row's completion, or all of a text row."""
    return _content(next(row[field] for field in ("completion", "text", "messages") if field in row))


def text_of(row: dict, joined: bool) -> str:
    """The text to score: the completion, after its prompt where `joined`."""
    prompt = row.get("prompt", "")
    if not joined or not prompt:
        return completion_of(row)
    return _content(prompt) + ("" if isinstance(prompt, str) else "\n") + completion_of(row)


def _content(text: str | list[dict]) -> str:
    """Plain text; messages are joined by their contents, one line each."""
    return text if isinstance(text, str) else "\n".join(message.get("content") or "" for message in text)


def describe(row: dict) -> str:
    """A row in an error message: its id, if it has one, and the beginning of its text."""
    names = ", ".join(f"{field} {row[field]}" for field in ("prompt_id", "k") if field in row)
    text = text_of(row, joined=True)
    return f"{names + ': ' if names else ''}{text[:_SHOWN] + '...' if len(text) > _SHOWN else text!r}"


class TruncationWarning:
    """Warns the first time that texts over a model's limit were truncated."""

    def __init__(self, path: str, limit: int | None):
        self.path, self.limit, self.given = path, limit, False

    def add(self, count: int) -> None:
        """Report `count` truncated texts."""
        if count and not self.given:
            self.given = True
            log.warn(f"{self.path}: {count} texts are longer than its {self.limit} tokens and were truncated")


class PairTokens:
    """Prompt and completion of a row as token ids, the EOS included where the text ended with it.

    The ids of a sampled row are used where they are this tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None):
        self.tokenizer, self.limit = tokenizer, limit
        self.fingerprint = fingerprint(tokenizer)

    def ids(self, row: dict) -> tuple[list[int], list[int], bool]:
        """(prompt ids, completion ids, whether they were truncated to the limit)."""
        finished = row.get("finish", "stop") == "stop"
        eos = self.tokenizer.eos_token_id
        if "completion_ids" in row and "prompt_ids" in row and row.get("tokenizer") == self.fingerprint:
            ended = [eos] if finished and eos is not None else []
            return self.truncated(row["prompt_ids"], row["completion_ids"] + ended)
        text = row.get("prompt", "")
        prompt = encode_prompt(self.tokenizer, text)
        completion = encode_completion(self.tokenizer, text, completion_of(row), prompt, finished=finished)
        return self.truncated(prompt, completion)

    def truncated(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int], bool]:
        """The ids within the limit, and whether some were dropped."""
        return truncate(prompt, completion, self.limit, self.limit) if self.limit else (prompt, completion, False)


class PairEncoder:
    """Rows to ids as a decoder's reward head is trained on them: prompt, completion, EOS where the text ended.

    A decoder finds its last token as the last one that is not padding, so where padding is the EOS, it is left out.
    """

    def __init__(self, path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, joined: bool):
        limit = context_length(model)
        self.tokenizer, self.joined = tokenizer, joined
        self.tokens = PairTokens(tokenizer, limit)
        self.warning = TruncationWarning(path, limit)
        self.without_eos = tokenizer.pad_token_id == tokenizer.eos_token_id

    def encode(self, rows: list[dict]) -> list[list[int]]:
        """Token ids of each row, within the model's context."""
        encoded, truncations = [], 0
        for row in rows:
            if self.without_eos:
                row = row | {"finish": "length"}
            if self.joined and row.get("prompt"):
                prompt, completion, truncated = self.tokens.ids(row)
            else:
                finished = row.get("finish", "stop") == "stop"
                text = encode_text(self.tokenizer, completion_of(row), finished=finished)
                prompt, completion, truncated = self.tokens.truncated([], text)
            encoded.append(prompt + completion)
            truncations += truncated
        self.warning.add(truncations)
        return encoded


class TextEncoder:
    """Rows to ids as text with the tokenizer's special tokens, within the limit of model and tokenizer."""

    def __init__(self, path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, joined: bool):
        self.tokenizer, self.joined = tokenizer, joined
        self.limit = _text_limit(model, tokenizer)
        self.warning = TruncationWarning(path, self.limit)

    def encode(self, rows: list[dict]) -> list[list[int]]:
        """Token ids of each row's text."""
        texts = [text_of(row, self.joined) for row in rows]
        if self.limit is None:
            return self.tokenizer(texts)["input_ids"]
        # One token more than fits shows which texts are too long.
        encoded = self.tokenizer(texts, truncation=True, max_length=self.limit + 1)["input_ids"]
        longer = [n for n, ids in enumerate(encoded) if len(ids) > self.limit]
        for n in longer:
            encoded[n] = self.tokenizer(texts[n], truncation=True, max_length=self.limit)["input_ids"]
        self.warning.add(len(longer))
        return encoded


def _text_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens of a text. RoBERTa and its relatives count positions from the padding index, which costs some."""
    limit = context_length(model)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    maximum = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None  # unset is a huge number
    return min((n for n in (limit, maximum) if n), default=None)
