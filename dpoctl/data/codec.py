"""How text becomes token ids for one model, and how its answers end.

A completion is its token ids, the end token included. In text it ends with the tokenizer's EOS, in a chat with the
token with which the template ends an answer; sampling stops at these and at the end tokens of the model's generation
configuration. A completion given as text is encoded up to and including the first token at which sampling would stop.
A completion's tokens are those that prompt and completion have together, after the prompt's.
"""

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError
from .chats import ChatTemplate, Prompt, Refusal, TemplateOptions, Text, content_of, strings_in, texts_of
from .tokens import Vocabulary, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Refuse = Callable[[int, Refusal], None]  # called with the index and the error of a chat that cannot be encoded
V = TypeVar("V")


class Codec:
    """A tokenizer with its chat template and end tokens.

    `model_ends`: the end tokens of the model's generation configuration. `text_end` ends a completion of a text,
    `chat_end` one of a chat.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        model_ends: Collection[int] = (),
        options: TemplateOptions | None = None,
    ):
        self.tokenizer, self.model_ends = tokenizer, frozenset(model_ends)
        self.vocabulary = Vocabulary(tokenizer)
        self.options = options or TemplateOptions()
        self.template = ChatTemplate(self.vocabulary, self.options)
        self.text_end: int | None = tokenizer.eos_token_id
        self._chat_ends: dict[Hashable, int | None] = {}
        self._leads: dict[Hashable, str] = {}

    @cached_property
    def fingerprint(self) -> str:
        """What stored ids are compared by; see `tokens.fingerprint`."""
        return fingerprint(self.tokenizer)

    @property
    def chat_end(self) -> int | None:
        """The first special token that the template writes after an answer; the EOS where it writes none."""
        return self._chat_end_of(Prompt([]))

    def _chat_end_of(self, prompt: Prompt) -> int | None:
        """`chat_end` with a prompt's tools, for which some tokenizers have a template of their own, and arguments."""
        key = (bool(prompt.tools), json.dumps(prompt.arguments, sort_keys=True))
        if key not in self._chat_ends:
            written = self.vocabulary.tokens([self.template.after_answer(prompt)])[0]
            special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
            ends = (id for id in written if id in special | {self.text_end})
            self._chat_ends[key] = next(ends, self.text_end)
        return self._chat_ends[key]

    @property
    def ends(self) -> frozenset[int]:
        """Every id that may end a completion."""
        return self.stops_of(Prompt([]))

    @property
    def bos_length(self) -> int:
        """How many ids the tokenizer prepends to a text: 1 where it adds a BOS, else mostly 0."""
        return len(self.vocabulary.prefix)

    def bos_of(self, ids: Sequence[int]) -> int:
        """How many ids at the start of a prompt are its BOS, or whatever the tokenizer prepends; 0 in many chats."""
        prefix = self.vocabulary.prefix
        if prefix and list(ids[: len(prefix)]) == prefix:
            return len(prefix)
        return int(bool(ids) and ids[0] == self.vocabulary.bos_id)

    def end_of(self, prompt: Prompt) -> int:
        """The id that ends a completion of a prompt. Raises InputError where the tokenizer has none."""
        end = self._chat_end_of(prompt) if self._ends_as_chat(prompt) else self.text_end
        if end is None:
            raise InputError("the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json")
        return end

    def stops_of(self, prompt: Prompt) -> frozenset[int]:
        """The ids at which sampling from a prompt stops."""
        ends = {self.text_end, self._chat_end_of(prompt)} if self._ends_as_chat(prompt) else {self.text_end}
        return self.model_ends | {end for end in ends if end is not None}

    def lead_of(self, prompt: Prompt) -> str:
        """The blanks with which a sampled answer begins that are the chat template's; see `ChatTemplate.lead`."""
        if not prompt.is_chat:
            return ""
        key = prompt.key  # PPO samples from the same prompts again
        if key not in self._leads:
            self._leads[key] = self.template.lead(prompt)
        return self._leads[key]

    def _ends_as_chat(self, prompt: Prompt) -> bool:
        return prompt.is_chat or (self._reads_markup and self.template.has_rendered(str(prompt.text)))

    @property
    def _reads_markup(self) -> bool:
        return self.options.rendered == "tokens"

    def _plain(self, text: str, *, answered: bool = False) -> str:
        """A string for the tokenizer. Raises Refusal for one that the chat template has rendered already."""
        if self.options.rendered == "refuse" and self.template.has_rendered(text, answered=answered):
            raise Refusal(
                "the text is already rendered with the chat template",
                "give messages; or --rendered tokens reads its special tokens, --rendered text keeps their characters",
            )
        return text if self._reads_markup else self.vocabulary.as_text(text)

    def describe_ends(self) -> str:
        """In words: how completions end."""
        text = f"a text ends with {self._shown(self.text_end)}"
        if self.tokenizer.chat_template is not None:
            text += f", a chat's answer with {self._shown(self.chat_end)}"
        others = sorted(self.model_ends - {self.text_end, self.chat_end})
        return text + (f"; sampling stops at {', '.join(map(self._shown, others))} too" if others else "")

    def _shown(self, end: int | None) -> str:
        return "nothing" if end is None else f"{self.tokenizer.convert_ids_to_tokens(end)!r} ({end})"

    # --- text to ids

    def encode_prompts(self, prompts: Sequence[Prompt], refuse: Refuse | None = None) -> list[list[int]]:
        """Ids of prompts: a BOS iff the tokenizer adds one or the text begins with it, then the text's.

        Messages are rendered by the chat template up to where the assistant's answer begins; the template alone decides
        on the BOS. `refuse` is told of each chat that the template refuses, whose ids are then empty; without it
        Refusal is raised.
        """
        opened = [_attempt(refuse, i, self._opened, prompt) or ([], "") for i, prompt in enumerate(prompts)]
        ids = self.vocabulary.tokens([text for _, text in opened])
        return [head + rest for (head, _), rest in zip(opened, ids, strict=True)]

    def encode_completions(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Text],
        prompt_ids: Sequence[list[int]],
        finished: Sequence[bool],
        refuse: Refuse | None = None,
    ) -> list[list[int]]:
        """Ids of completions as they follow their prompts' ids, with one end token where they are `finished`.

        A completion that spells the EOS last is finished too. `refuse` as for prompts.
        """
        rows = zip(prompts, completions, finished, strict=True)
        parts = [_attempt(refuse, i, self._parts, *row) or _NOTHING for i, row in enumerate(rows)]
        joined = self.vocabulary.tokens([part.before + part.earlier + part.last for part in parts])
        results: list[list[int]] = []
        merged: list[int] = []
        for i, (part, ids) in enumerate(zip(parts, joined, strict=True)):
            ids, start = part.head + ids, len(prompt_ids[i])
            results.append(ids[start:])
            if ids[:start] != prompt_ids[i] or (part.last and len(ids) == start):
                merged.append(i)  # a token spans the boundary: the completion is tokenised as a continuation
        texts = [parts[i].earlier + parts[i].last for i in merged]
        for i, ids in zip(merged, self.vocabulary.continuations(texts), strict=True):
            results[i] = ids
        return [self._ended(*row) for row in zip(prompts, results, parts, strict=True)]

    def encode_texts(
        self, texts: Sequence[str], finished: Sequence[bool], refuse: Refuse | None = None
    ) -> list[list[int]]:
        """Ids of whole texts: a BOS iff the tokenizer adds one, and an EOS iff `finished` or the text ends in it."""
        rows = enumerate(zip(texts, finished, strict=True))
        parts = [_attempt(refuse, i, self._text_parts, *row) or _NOTHING for i, row in rows]
        ids = self.vocabulary.tokens([part.last for part in parts])
        return [self._closed_text(part, part.head + rest) for part, rest in zip(parts, ids, strict=True)]

    def _text_parts(self, text: str, finished: bool) -> "_Parts":
        head, body = self.vocabulary.open(text)
        body, closed = self.vocabulary.close(body)
        return _Parts(head, "", "", self._plain(body, answered=True), finished or closed)

    def _closed_text(self, part: "_Parts", ids: list[int]) -> list[int]:
        if not part.ended or (self._reads_markup and ids[-1:] and ids[-1] in self.ends):
            return ids
        return [*ids, self.end_of(Prompt(""))]

    def with_end(self, prompt: Prompt, ids: list[int], finished: bool) -> list[int]:
        """Stored ids of a completion; one that is finished without an end token (at a stop string) gets it."""
        if not finished or ids[-1:] and ids[-1] in self.stops_of(prompt):
            return ids
        return [*ids, self.end_of(prompt)]

    def count_special(self, rows: Iterable[Sequence[Prompt | Text]]) -> int:
        """How many rows contain a text that spells a special token, other than a BOS first or an EOS last.

        Such a string is read as plain text, which may not be what its author meant.
        """
        return sum(any(self.vocabulary.spells_special(text) for text in _strings(row)) for row in rows)

    # --- parts

    def _opened(self, prompt: Prompt) -> tuple[list[int], str]:
        """(the ids before a prompt, its text)."""
        if isinstance(prompt.text, str):
            head, text = self.vocabulary.open(prompt.text)
            return head, self._plain(text)
        return [], self.template.prompt_text(prompt)

    def _parts(self, prompt: Prompt, completion: Text, finished: bool) -> "_Parts":
        head, before = self._opened(prompt)
        completion, closed = self._closed(completion)
        if prompt.is_chat:
            earlier, last = self.template.answer_text(prompt, completion, before, finished=finished or closed)
        elif isinstance(completion, str):
            earlier, last = "", completion if self._reads_markup else self.vocabulary.as_text(completion)
        else:
            raise Refusal("the completion is a list of messages, but the prompt is a string")
        return _Parts(head, before, earlier, last, finished or closed)

    def _closed(self, completion: Text) -> tuple[Text, bool]:
        """(the completion without an EOS string at its end, whether it had one)."""
        if isinstance(completion, str):
            return self.vocabulary.close(completion)
        content, closed = self.vocabulary.close(content_of(completion[-1]))
        return ([*completion[:-1], {**completion[-1], "content": content}], True) if closed else (completion, False)

    def _ended(self, prompt: Prompt, ids: list[int], part: "_Parts") -> list[int]:
        """`ids` up to the first token at which sampling would stop; an end token is added where there is none."""
        if not part.ended:
            return ids
        stops = self.stops_of(prompt)
        # Several messages that answer: those before the last have ended, too, and the sequence goes on after them.
        first = len(self.vocabulary.tokens([part.earlier])[0]) if part.earlier else 0
        at = next((n for n in range(first, len(ids)) if ids[n] in stops), None)
        return [*ids, self.end_of(prompt)] if at is None else ids[: at + 1]


@dataclass(frozen=True)
class _Parts:
    """The ids before a prompt, its text, and the completion's: before its last message, and that."""

    head: list[int]
    before: str
    earlier: str
    last: str
    ended: bool


_NOTHING = _Parts([], "", "", "", False)


def _attempt(refuse: Refuse | None, i: int, encode: Callable[..., V], *arguments: object) -> V | None:
    """`encode(*arguments)`; None where the chat of index i is refused and `refuse` has been told."""
    try:
        return encode(*arguments)
    except Refusal as error:
        if refuse is None:
            raise
        refuse(i, error)
        return None


def _strings(row: Sequence[Prompt | Text]) -> list[str]:
    return [
        text
        for part in row
        for text in (
            strings_in([part.text, part.tools, texts_of(part.arguments)])
            if isinstance(part, Prompt)
            else strings_in(part)
        )
    ]
