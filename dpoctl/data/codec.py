"""How text becomes token ids for one model, and how its answers end.

A completion is its token ids, the end token included. In text it ends with the tokenizer's EOS, in a chat with the
token with which the template ends an answer; sampling stops at these and at the end tokens of the model's generation
configuration. A completion given as text is encoded up to and including the first token at which sampling would stop.
A completion's tokens are those that prompt and completion have together, after the prompt's.
"""

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..errors import InputError
from .chats import (
    ChatTemplate,
    Prompt,
    Refusal,
    TemplateOptions,
    Text,
    content_of,
    is_in_thought,
    joined,
    lacks_thought,
    messages_of,
    strings_in,
    texts_of,
)
from .gaps import Gaps
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
        return [found.ids for found in self.encode_answers(prompts, completions, prompt_ids, finished, refuse)]

    def encode_answers(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Text],
        prompt_ids: Sequence[list[int]],
        finished: Sequence[bool],
        refuse: Refuse | None = None,
    ) -> list["Completion"]:
        """As `encode_completions`; of several messages, what lies between those of the assistant are gaps."""
        several = [i for i, each in enumerate(completions) if isinstance(each, list) and len(each) > 1]
        last, last_ids, found = list(prompts), list(prompt_ids), [Completion([])] * len(prompts)
        refused: set[int] = set()
        for i in several:
            opened = _attempt(refuse, i, self._until_last, prompts[i], completions[i], prompt_ids[i])
            if opened is None:
                refused.add(i)
            else:
                last[i], last_ids[i], found[i] = opened
        left = [i for i in range(len(prompts)) if i not in refused]
        encoded = self._encode_last(
            [last[i] for i in left],
            [completions[i] for i in left],
            [last_ids[i] for i in left],
            [finished[i] for i in left],
            refuse and (lambda n, error: refuse(left[n], error)),
        )
        for i, each in zip(left, encoded, strict=True):
            found[i] = each._replace(ids=found[i].ids + each.ids, gaps=found[i].gaps) if found[i].gaps else each
        return found

    def _until_last(
        self, prompt: Prompt, completion: list[dict], prompt_ids: list[int]
    ) -> tuple[Prompt, list[int], "Completion"]:
        """(what the last of several messages answers, its ids, those of them that follow the prompt, with the gaps).

        Every message of the assistant ends with the first token at which sampling stops; what follows it, up to where
        the next one begins, is a gap.
        """
        if not prompt.is_chat:
            raise Refusal(_TEXT_ANSWERED)
        ends = [n for n in range(1, len(completion)) if completion[n]["role"] == "assistant"]
        prompts = [replace(prompt, text=joined(prompt, completion[:n]), closed=True) for n in ends]
        texts = [text for _, text in map(self._opened, [prompt, *prompts])]
        ids = [prompt_ids, *self.vocabulary.tokens(texts[1:])]
        stops, gaps = self.stops_of(prompt), []
        for n, message in enumerate([completion[0], *(completion[end] for end in ends[:-1])]):
            begin, until = len(ids[n]), len(ids[n + 1])
            at = begin - 1  # where the message ends
            if message["role"] == "assistant":
                at = next((place for place in range(begin, until) if ids[n + 1][place] in stops), until)
            said, content = texts[n + 1][len(texts[n]) :], self.vocabulary.as_text(content_of(message))
            if ids[n + 1][:begin] != ids[n] or at == until or lacks_thought(said, content):
                raise Refusal(_NOT_CONTINUED, _HINT)
            gaps.append((at + 1 - len(prompt_ids), until - len(prompt_ids)))
        return prompts[-1], ids[-1], Completion(ids[-1][len(prompt_ids) :], gaps)

    def _encode_last(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Text],
        prompt_ids: Sequence[list[int]],
        finished: Sequence[bool],
        refuse: Refuse | None,
    ) -> list["Completion"]:
        """The completions' last messages, as they follow `prompts`."""
        rows = zip(prompts, completions, finished, strict=True)
        parts = [_attempt(refuse, i, self._parts, *row) or _NOTHING for i, row in enumerate(rows)]
        together = self.vocabulary.tokens([part.before + part.text for part in parts])
        results: list[list[int]] = []
        merged: list[int] = []
        for i, (part, ids) in enumerate(zip(parts, together, strict=True)):
            ids, start = part.head + ids, len(prompt_ids[i])
            results.append(ids[start:])
            if ids[:start] != prompt_ids[i] or (part.text and len(ids) == start):
                merged.append(i)  # a token spans the boundary: the completion is tokenised as a continuation
        for i, ids in zip(merged, self.vocabulary.continuations([parts[i].text for i in merged]), strict=True):
            results[i] = ids
        return [
            Completion(self._ended(prompt, ids, part), in_thought=part.in_thought)
            for prompt, ids, part in zip(prompts, results, parts, strict=True)
        ]

    def encode_texts(
        self, texts: Sequence[str], finished: Sequence[bool], refuse: Refuse | None = None
    ) -> list[list[int]]:
        """Ids of whole texts: a BOS iff the tokenizer adds one, and an EOS iff `finished` or the text ends in it."""
        rows = enumerate(zip(texts, finished, strict=True))
        parts = [_attempt(refuse, i, self._text_parts, *row) or _NOTHING for i, row in rows]
        ids = self.vocabulary.tokens([part.text for part in parts])
        return [self._closed_text(part, part.head + rest) for part, rest in zip(parts, ids, strict=True)]

    def _text_parts(self, text: str, finished: bool) -> "_Parts":
        head, body = self.vocabulary.open(text)
        body, closed = self.vocabulary.close(body)
        return _Parts(head, "", self._plain(body, answered=True), finished or closed)

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
        """The parts of a completion, of which all messages but the last belong to the prompt."""
        head, before = self._opened(prompt)
        completion, closed = self._closed(completion)
        ended = finished or closed
        if not prompt.is_chat:
            if not isinstance(completion, str):
                raise Refusal(_TEXT_ANSWERED)
            text = completion if self._reads_markup else self.vocabulary.as_text(completion)
            return _Parts(head, before, text, ended)
        answer = messages_of(completion)[-1]
        calls = bool(answer.get("tool_calls"))  # which are written after the content, and all of them
        text = self.template.answer_text(prompt, answer, before, finished=ended or calls)
        return _Parts(head, before, text, ended, calls, ended and is_in_thought(before, text))

    def _closed(self, completion: Text) -> tuple[Text, bool]:
        """(the completion without an EOS string at its end, whether it had one)."""
        if isinstance(completion, str):
            return self.vocabulary.close(completion)
        content, closed = self.vocabulary.close(content_of(completion[-1]))
        return ([*completion[:-1], {**completion[-1], "content": content}], True) if closed else (completion, False)

    def _ended(self, prompt: Prompt, ids: list[int], part: "_Parts") -> list[int]:
        """`ids` up to the first token at which sampling would stop; an end token is added where there is none.

        A cut answer with tool calls, which the template ends too, is without that token.
        """
        if not part.ended and not part.calls:
            return ids
        stops = self.stops_of(prompt)
        at = next((n for n, id in enumerate(ids) if id in stops), None)
        if not part.ended:
            return ids[:at]
        return [*ids, self.end_of(prompt)] if at is None else ids[: at + 1]


@dataclass(frozen=True)
class _Parts:
    """The ids before a prompt, its text, and the completion's text; whether that ended, and has tool calls.

    `in_thought`: the whole answer is part of a thought that the prompt opens.
    """

    head: list[int]
    before: str
    text: str
    ended: bool
    calls: bool = False
    in_thought: bool = False


_NOTHING = _Parts([], "", "", False)
_TEXT_ANSWERED = "the completion is a list of messages, but the prompt is a string"
_NOT_CONTINUED = "the chat template renders the first of several messages that answer differently once others follow"
_HINT = "give the messages before the last answer as the end of the prompt"


class Completion(NamedTuple):
    """The ids of a completion, its gaps, and whether all of it is part of a thought that the prompt opens."""

    ids: list[int]
    gaps: Gaps = ()
    in_thought: bool = False


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
