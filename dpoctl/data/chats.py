"""Chats to text: a tokenizer's chat template as its model uses it, with tools, arguments and a fixed date.

Text in a message stays text: the string of a special token is cut (see `tokens`), in contents, tools and the arguments
of tool calls alike, so that only the template writes special tokens.
"""

import datetime
import json
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from ..errors import InputError
from .tokens import CUT, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | list[dict]  # plain text, or chat messages {"role", "content"}

_PROBE = "zqxj"  # a text that no template writes on its own
_TAG = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")


# The clock of templates, in their own language: transformers passes them data alone, no functions.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set all = namespace(text=format) %}"
    "{% for directive, text in directives.items() %}{% set all.text = all.text.replace(directive, text) %}{% endfor %}"
    "{{ all.text }}{% endmacro %}\n"
)


class Refusal(InputError):
    """A chat that the template refuses, or that has none: the fault of one row."""


@dataclass(frozen=True)
class TemplateOptions:
    """How chat templates are applied.

    `arguments` are passed to each template. `template` replaces the tokenizer's. `rendered`: what to do with a string
    that the template has rendered already: "refuse" it, read its special tokens as characters of the "text", or as the
    "tokens" that they spell. `today` is asked for the date, by templates that write it.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    rendered: str = "refuse"
    today: Callable[[], datetime.date] = datetime.date.today


@dataclass(frozen=True)
class Prompt:
    """What is answered: plain text or messages, perhaps with the tools and template arguments of its row."""

    text: Text
    tools: list[dict] | None = None
    arguments: Mapping[str, Any] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the chat template renders it."""
        return not isinstance(self.text, str)

    @property
    def key(self) -> Hashable:
        """What equal prompts have in common."""
        if isinstance(self.text, str):
            return self.text
        return json.dumps([self.text, self.tools, self.arguments], sort_keys=True)


def prompt_of(row: Mapping[str, Any], text: Text | None = None) -> Prompt:
    """The prompt of a row (or `text` in its place) with the row's tools and template arguments."""
    found = row.get("prompt", "") if text is None else text
    return Prompt(found, row.get("tools") or None, row.get("chat_template_kwargs") or None)


def content_of(message: Mapping[str, Any]) -> str:
    """A message's text; empty for a tool call without one."""
    return message.get("content") or ""


def reads_clock(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a chat template writes today's date."""
    template = tokenizer.chat_template or ""
    return "strftime_now" in (template if isinstance(template, str) else json.dumps(template))


def _directives(day: datetime.date) -> dict[str, str]:
    """Every directive of strftime, with what it gives on a day."""
    names = [f"{flag}{letter}" for flag in ("-", "") for letter in "aAwdbBmyYHIpMSfjUWcxXGuV"]
    return {f"%{name}": day.strftime(f"%{name}") for name in names} | {"%%": "%"}


class ChatTemplate:
    """A tokenizer's chat template, with the options of the command."""

    def __init__(self, vocabulary: Vocabulary, options: TemplateOptions):
        self.vocabulary, self.tokenizer = vocabulary, vocabulary.tokenizer
        self.arguments = dict(options.arguments)
        self.directives = _directives(options.today()) if reads_clock(self.tokenizer) else {}

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as rendered up to where the answer begins; an assistant's beginning is continued, not closed."""
        assert not isinstance(prompt.text, str)
        continued = prompt.text[-1]["role"] == "assistant"
        return self._render(prompt, prompt.text, generation_prompt=not continued, continued=continued)

    def answer_text(self, prompt: Prompt, completion: Text, before: str, *, finished: bool) -> tuple[str, str]:
        """(text before the last answer, text from there) of what the template writes after the prompt `before`.

        The first is empty unless several messages answer. An unfinished answer stops at its last character. Where the
        template renders the prompt differently once it is answered (some drop thoughts of earlier turns), the answer
        follows the prompt as it is rendered for generation. A thought that the prompt opens is not opened twice.
        """
        assert not isinstance(prompt.text, str)
        messages, answer = prompt.text, self._messages(completion)
        content = content_of(answer[-1])
        if messages[-1]["role"] == "assistant":
            start = content_of(messages[-1])
            messages, answer = messages[:-1], [*answer]
            answer[0] = {**answer[0], "content": start + content_of(answer[0])}
        rendered = self._render(prompt, [*messages, *answer])
        shown = self.vocabulary.as_text(content).strip()  # most templates strip it
        at = rendered.rfind(shown, 0, self._answer_limit(rendered)) if shown else -1
        if rendered.startswith(before) and (finished or at >= len(before)):
            text = rendered[len(before) :] if finished else rendered[len(before) : at + len(shown)]
            return self._split(prompt, answer, before, text)
        if len(answer) > 1:
            raise Refusal("the chat template renders the prompt differently once several messages answer it")
        text = self.vocabulary.as_text(content[_opened(before, content) :])
        return "", text + (rendered[at + len(shown) :] if finished and at >= 0 else "")

    def _answer_limit(self, rendered: str) -> int:
        """Where what the template writes after an answer begins, which may spell the answer's last words too."""
        after = self.after_answer
        return len(rendered) - len(after) if rendered.endswith(after) else len(rendered)

    def _split(self, prompt: Prompt, answer: list[dict], before: str, text: str) -> tuple[str, str]:
        """`text`, which follows `before`, split where the last of several answers begins."""
        if len(answer) == 1:
            return "", text
        assert not isinstance(prompt.text, str)
        earlier = self._render(prompt, [*prompt.text, *answer[:-1]], generation_prompt=True)
        if not (before + text).startswith(earlier):
            raise Refusal("the chat template renders the prompt differently once several messages answer it")
        return text[: len(earlier) - len(before)], text[len(earlier) - len(before) :]

    def conversation_text(self, prompt: Prompt) -> str:
        """All messages as the template renders a conversation, nothing after them."""
        assert not isinstance(prompt.text, str)
        return self._render(prompt, prompt.text)

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after an answer; empty where there is no template or it refuses two messages."""
        return self._after([{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}], False)

    @cached_property
    def after_question(self) -> str:
        """What the template writes between a question and its answer; empty as above."""
        return self._after([{"role": "user", "content": _PROBE}], True)

    def _after(self, messages: list[dict], generation_prompt: bool) -> str:
        if self.tokenizer.chat_template is None:
            return ""
        try:
            text = self._render(Prompt(messages), messages, generation_prompt=generation_prompt)
        except InputError:
            return ""
        return text.rpartition(_PROBE)[2]

    def has_rendered(self, text: str, *, answered: bool = False) -> bool:
        """Whether a string is a prompt (or a whole dialogue) that the template, or one like it, has rendered."""
        turn = self.after_question.strip()
        if not turn or not self.vocabulary.spells_special(turn):
            return False
        if answered:
            end = self.after_answer.strip()
            return bool(end) and turn in text and text.rstrip().endswith(end)
        return text.rstrip().endswith(turn)

    @staticmethod
    def _messages(completion: Text) -> list[dict]:
        return completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]

    def _render(
        self, prompt: Prompt, messages: list[dict], *, generation_prompt: bool = False, continued: bool = False
    ) -> str:
        """The messages as text. Raises Refusal where there is no template, or it refuses them."""
        if self.tokenizer.chat_template is None:
            raise Refusal(
                "messages, but the tokenizer has no chat template",
                hint="give prompt and answers as strings (--columns prompt=system+question makes text of columns), "
                "a model with a chat template, or --chat-template FILE",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                self._as_text(messages),
                tools=self._as_text(prompt.tools),
                tokenize=False,
                chat_template=self._dated(prompt),
                add_generation_prompt=generation_prompt,
                continue_final_message=continued,
                **({"directives": self.directives} | self.arguments | dict(prompt.arguments or {})),
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            hint = "the template itself is broken: --chat-template FILE replaces it"
            hint = hint if isinstance(error, TemplateSyntaxError) else _hint(messages)
            raise Refusal(f"the chat template refuses the messages: {error}", hint) from None
        return text.replace(json.dumps(CUT)[1:-1], CUT)  # as a JSON filter in the template may have written it

    def _dated(self, prompt: Prompt) -> str | None:
        """The template where it writes the date, with a clock that stands still; None for the tokenizer's as it is."""
        return _CLOCK + self.tokenizer.get_chat_template(None, prompt.tools) if self.directives else None

    def _as_text(self, value: Any) -> Any:
        """The value with every string in it as text that spells no special token."""
        if isinstance(value, str):
            return self.vocabulary.as_text(value)
        if isinstance(value, list):
            return [self._as_text(item) for item in value]
        if isinstance(value, dict):
            return {self._as_text(key): self._as_text(item) for key, item in value.items()}
        return value


def strings_in(value: Any) -> list[str]:
    """Every string in messages or tools."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings_in(item)] if isinstance(value, list) else []


def _opened(before: str, content: str) -> int:
    """How many characters at the start of an answer the prompt's end has written already: a tag such as `<think>`."""
    for size in range(min(len(before), len(content)), 0, -1):
        if before.endswith(content[:size]) and _TAG.fullmatch(content[:size].strip()):
            return size
    return 0


def _hint(messages: list[dict]) -> str:
    if any(message["role"] in ("system", "developer") for message in messages):
        return "if it takes no system message, begin the first user message with that text, or use --chat-template FILE"
    return "roles must alternate in many templates; --skip-bad-rows skips such rows, --chat-template FILE replaces it"
