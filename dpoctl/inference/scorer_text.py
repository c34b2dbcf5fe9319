"""What scorers read: rows as text, as conversations, and as token ids of prompt and completion."""

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from .. import log
from ..data.answers import row_tokens
from ..data.chats import Prompt, Text, content_of, joined
from ..data.codec import Codec
from ..data.encode import Limits, truncate
from ..data.gaps import Gaps, cut_to
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


def conversation_of(row: dict) -> list[dict] | None:
    """All messages of a row, the answer last; None for a row of text."""
    if row.get("messages"):
        return row["messages"]
    prompt, completion = row.get("prompt"), row.get("completion", "")
    if not isinstance(prompt, list):
        return None
    answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return joined(Prompt(prompt), answer)


def _as_completion(row: dict) -> dict:
    """A row of messages as prompt and completion; other rows as they are."""
    messages = row.get("messages")
    if not messages:
        return row
    start = len(messages) - 1
    while start > 1 and messages[start - 1]["role"] == "assistant":  # these do not begin the last one, but are answers
        start -= 1
    return row | {"prompt": messages[:start], "completion": messages[start:]}


def _content(text: Text) -> str:
    """Plain text; messages are joined by their contents, one line each."""
    return text if isinstance(text, str) else "\n".join(map(content_of, text))


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


class Encoding(NamedTuple):
    """A text's token ids; `types`: of a pair of texts, which of them each token is of, where the tokenizer says it."""

    ids: list[int]
    types: list[int] | None = None


class PairTokens:
    """Prompt and completion of a row as token ids, the end token included where the completion is finished.

    The ids of a sampled row are used where they are this tokenizer's and this text's.
    """

    def __init__(self, codec: Codec, limit: int | None):
        self.codec, self.limit = codec, limit

    def ids(self, row: dict) -> tuple[list[int], list[int], Gaps, bool]:
        """(prompt ids, completion ids, the completion's gaps, whether they were truncated to the limit)."""
        row = _as_completion(row)
        prompt, completion, gaps = row_tokens(self.codec, row, finished=row.get("finish") != "length")
        prompt, ids, truncated = self.truncated(prompt, completion)
        return prompt, *cut_to(completion, gaps, len(ids)), truncated

    def truncated(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int], bool]:
        """The ids within the limit, and whether some were dropped."""
        return truncate(prompt, completion, Limits(self.limit, self.limit))


class PairEncoder:
    """Rows to ids as train-rm trains on them: prompt, completion, an end token where the completion is finished.

    A decoder finds its last token as the last one that is not padding, so where padding is the end token, it is left
    out.
    """

    def __init__(self, path: str, model: PreTrainedModel, codec: Codec, joined: bool):
        limit = context_length(model)
        self.codec, self.joined = codec, joined
        self.tokens = PairTokens(codec, limit)
        self.warning = TruncationWarning(path, limit)
        self.pad = codec.tokenizer.pad_token_id

    def encode(self, rows: list[dict]) -> list[Encoding]:
        """Token ids of each row, within the model's context."""
        encoded, truncations = [], 0
        for row in rows:
            if row.get("messages") or (self.joined and row.get("prompt")):
                prompt, completion, _, truncated = self.tokens.ids(row)
            else:
                finished = row.get("finish") != "length"
                [text] = self.codec.encode_texts([completion_of(row)], [finished])
                prompt, completion, truncated = self.tokens.truncated([], text)
            ids = prompt + completion
            encoded.append(Encoding(ids[:-1] if ids[-1:] == [self.pad] else ids))
            truncations += truncated
        self.warning.add(truncations)
        return encoded


class TextEncoder:
    """Rows to ids as a model from elsewhere was trained on them, within the limit of model and tokenizer.

    A conversation is what the tokenizer's chat template writes; without a template, its contents. A text is what the
    tokenizer makes of it, special tokens included; of prompt and completion, a tokenizer that separates the two texts
    of a pair gets them as a pair where the model has one label.
    """

    def __init__(self, path: str, model: PreTrainedModel, codec: Codec, joined: bool):
        self.codec, self.tokenizer, self.joined = codec, codec.tokenizer, joined
        self.limit = _text_limit(model, codec.tokenizer)
        self.warning = TruncationWarning(path, self.limit)
        self.has_template = codec.tokenizer.chat_template is not None
        self.takes_pairs = model.config.num_labels == 1 and not hasattr(model, "score") and joined

    def encode(self, rows: list[dict]) -> list[Encoding]:
        """Token ids of each row, and of pairs their types."""
        chats = {n: chat for n, row in enumerate(rows) if self._reads_chats and (chat := conversation_of(row))}
        texts = {n: self._text(row) for n, row in enumerate(rows) if n not in chats}
        encoded = dict(zip(texts, self._of_texts(list(texts.values())), strict=True)) if texts else {}
        encoded |= dict(zip(chats, self._of_chats(list(chats.values()), rows, list(chats)), strict=True))
        return [encoded[n] for n in range(len(rows))]

    @property
    def _reads_chats(self) -> bool:
        return self.has_template and self.joined

    def _text(self, row: dict) -> tuple[str, ...]:
        prompt = row.get("prompt")
        if self.takes_pairs and prompt and "completion" in row:
            return (_content(prompt), completion_of(row))
        return (text_of(row, self.joined),)

    def _of_texts(self, texts: list[tuple[str, ...]]) -> list[Encoding]:
        if len({len(text) for text in texts}) > 1:
            return [encoding for text in texts for encoding in self._of_texts([text])]
        if self.limit is None:
            return self._tokenized(texts)
        # One token more than fits shows which texts are too long.
        encoded = self._tokenized(texts, truncation=True, max_length=self.limit + 1)
        longer = [n for n, encoding in enumerate(encoded) if len(encoding.ids) > self.limit]
        for n in longer:
            [encoded[n]] = self._tokenized([texts[n]], truncation=True, max_length=self.limit)
        self.warning.add(len(longer))
        return encoded

    def _tokenized(self, texts: list[tuple[str, ...]], **options: Any) -> list[Encoding]:
        """Texts, or pairs of texts, as the tokenizer encodes them."""
        found = self.tokenizer(*(list(column) for column in zip(*texts, strict=True)), **options)
        types = found.get("token_type_ids") or [None] * len(texts)
        return [Encoding(ids, of_ids) for ids, of_ids in zip(found["input_ids"], types, strict=True)]

    def _of_chats(self, chats: list[list[dict]], rows: list[dict], places: list[int]) -> list[Encoding]:
        """A conversation over the limit keeps its BOS and its end, where the reward is read."""
        texts = [
            self.codec.template.conversation_text(
                Prompt(chat, rows[n].get("tools"), rows[n].get("chat_template_kwargs"))
            )
            for chat, n in zip(chats, places, strict=True)
        ]
        encoded = self.codec.vocabulary.tokens(texts)
        cut = [truncate(ids, [], Limits(prompt=self.limit), self.codec.bos_of(ids)) for ids in encoded]
        self.warning.add(sum(truncated for _, _, truncated in cut))
        return [Encoding(ids) for ids, _, _ in cut]


def _text_limit(model: PreTrainedModel, tokenizer: Any) -> int | None:
    """The most tokens of a text. RoBERTa and its relatives count positions from the padding index, which costs some."""
    limit = context_length(model)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    maximum = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None  # unset is a huge number
    return min((n for n in (limit, maximum) if n), default=None)
