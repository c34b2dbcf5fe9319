"""Chats to text: a tokenizer's chat template as its model uses it, with tools, arguments and a fixed date.

Text in a message stays text: the string of a special token is cut (see `tokens`), in contents, tools and the arguments
of tool calls alike, so that only the template writes special tokens.
"""

import datetime
import json
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
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
_THOUGHT = re.compile(r"\s*(<\w*(think|thought|reason)\w*>|\[THINK\])")
_END_OF_THOUGHT = re.compile(r"</\w*(think|thought|reason)\w*>|\[/THINK\]")


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
    """What is answered: plain text or messages, perhaps with the tools and template arguments of its row.

    A last message of the assistant is the beginning of the answer, unless it is `closed`.
    """

    text: Text
    tools: list[dict] | None = None
    arguments: Mapping[str, Any] | None = None
    closed: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether the chat template renders it."""
        return not isinstance(self.text, str)

    @property
    def key(self) -> Hashable:
        """What equal prompts have in common."""
        if isinstance(self.text, str):
            return self.text
        closed = ["closed"] if self.closed and self.text[-1]["role"] == "assistant" else []
        return json.dumps([self.text, self.tools, self.arguments, *closed], sort_keys=True)


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
        before, beginning = split_beginning(prompt)
        if beginning is None:
            return self._render(prompt, before, generation_prompt=True)
        return self._render(prompt, prompt.text, continued=True)

    def answer_text(self, prompt: Prompt, answer: dict, before: str, *, finished: bool) -> str:
        """What the template writes after the prompt `before`, for one message that answers it.

        An unfinished answer stops where its text does. Where the template renders the prompt differently once it is
        answered, or drops the answer's thought, the answer follows the prompt as it is rendered for generation. A
        thought that the prompt opens is not opened twice.
        """
        messages = joined(prompt, [answer])
        content = self.vocabulary.as_text(content_of(answer))
        until, after = (None, "") if finished else self._around_end(prompt, messages)
        whole = self._render(prompt, messages) if finished else until
        if whole is not None and whole.startswith(before):
            text = whole[len(before) :]
            if not lacks_thought(text, content):
                return text
        if finished:
            after = self._around_end(prompt, messages)[1]
        return content[_opened(before, content) :] + after * finished

    def lead(self, prompt: Prompt) -> str:
        """The blanks that the template writes between a prompt and its answer, which are not part of the answer."""
        try:
            answered = self._render(prompt, joined(prompt, [{"role": "assistant", "content": _PROBE}]))
            before = self.prompt_text(prompt)
        except Refusal:
            return ""
        found = answered[len(before) :].partition(_PROBE)[0] if answered.startswith(before) else ""
        return found if found.isspace() else ""

    def _around_end(self, prompt: Prompt, messages: list[dict]) -> tuple[str | None, str]:
        """(the rendered text up to the end of the last content, what the template writes after it).

        None and nothing where the template does not write the content as it is.
        """
        content = content_of(messages[-1])
        try:
            marked = self._render(prompt, [*messages[:-1], {**messages[-1], "content": content + _PROBE}])
        except Refusal:
            return None, ""
        until, mark, after = marked.rpartition(_PROBE)
        return (until, after) if mark else (None, "")

    def conversation_text(self, prompt: Prompt) -> str:
        """All messages as the template renders a conversation, nothing after them."""
        assert not isinstance(prompt.text, str)
        return self._render(prompt, prompt.text)

    def after_answer(self, prompt: Prompt) -> str:
        """What the template writes after an answer, with a prompt's tools and arguments.

        Empty where there is no template, or it refuses two messages.
        """
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}]
        return self._after(replace(prompt, text=messages), generation_prompt=False)

    @cached_property
    def after_question(self) -> str:
        """What the template writes between a question and its answer; empty as above."""
        return self._after(Prompt([{"role": "user", "content": _PROBE}]), generation_prompt=True)

    def _after(self, prompt: Prompt, *, generation_prompt: bool) -> str:
        if self.tokenizer.chat_template is None:
            return ""
        assert not isinstance(prompt.text, str)
        try:
            text = self._render(prompt, prompt.text, generation_prompt=generation_prompt)
        except InputError:
            return ""
        return text.rpartition(_PROBE)[2]

    def has_rendered(self, text: str, *, answered: bool = False) -> bool:
        """Whether a string is a prompt (or a whole dialogue) that the template, or one like it, has rendered."""
        turn = self.after_question.strip()
        if not turn or not self.vocabulary.spells_special(turn):
            return False
        if answered:
            end = self.after_answer(Prompt([])).strip()
            return bool(end) and turn in text and text.rstrip().endswith(end)
        return text.rstrip().endswith(turn)

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
        arguments = {"directives": self.directives} | self.arguments | self._arguments_of(prompt)
        try:
            text = self.tokenizer.apply_chat_template(
                self._as_text(messages),
                tools=self._as_text(prompt.tools),
                tokenize=False,
                chat_template=self._dated(arguments.pop("chat_template", None), prompt),
                add_generation_prompt=generation_prompt,
                continue_final_message=continued,
                **arguments,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            hint = "the template itself is broken: --chat-template FILE replaces it"
            hint = hint if isinstance(error, TemplateSyntaxError) else _hint(messages)
            raise Refusal(f"the chat template refuses the messages: {error}", hint) from None
        return text.replace(json.dumps(CUT)[1:-1], CUT)  # as a JSON filter in the template may have written it

    def _arguments_of(self, prompt: Prompt) -> dict[str, Any]:
        """The arguments of a row, in which text stays text; the template itself may be one of them."""
        given = dict(prompt.arguments or {})
        return given | self._as_text(texts_of(given))

    def _dated(self, template: str | None, prompt: Prompt) -> str | None:
        """A template, or the name of one, by default the tokenizer's; with a clock that stands still where it has one.

        None stands for the tokenizer's as it is.
        """
        return _CLOCK + self.tokenizer.get_chat_template(template, prompt.tools) if self.directives else template

    def _as_text(self, value: Any) -> Any:
        """The value with every string in it as text that spells no special token."""
        if isinstance(value, str):
            return self.vocabulary.as_text(value)
        if isinstance(value, list):
            return [self._as_text(item) for item in value]
        if isinstance(value, dict):
            return {self._as_text(key): self._as_text(item) for key, item in value.items()}
        return value


def texts_of(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row's template arguments whose text the template may write."""
    return {name: value for name, value in (arguments or {}).items() if name != "chat_template"}


def strings_in(value: Any) -> list[str]:
    """Every string in messages or tools."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings_in(item)] if isinstance(value, list) else []


def split_beginning(prompt: Prompt) -> tuple[list[dict], dict | None]:
    """(the messages before the assistant's beginning of an answer, that beginning); None where there is none.

    An empty message that an answer is to follow begins nothing.
    """
    messages = prompt.text
    assert not isinstance(messages, str)
    if prompt.closed or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        return messages, None
    return messages[:-1], messages[-1] if content_of(messages[-1]).strip() else None


def messages_of(completion: Text) -> list[dict]:
    """A completion as messages: a text is one of the assistant."""
    return completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]


def joined(prompt: Prompt, answer: list[dict]) -> list[dict]:
    """All messages of a chat: an assistant's beginning and the answer that continues it are one message."""
    messages, beginning = split_beginning(prompt)
    if beginning is None:
        return [*messages, *answer]
    first = {**beginning, **answer[0], "content": content_of(beginning) + content_of(answer[0])}
    return [*messages, first, *answer[1:]]


def lacks_thought(text: str, content: str) -> bool:
    """Whether the thought with which a content begins is not in a text as it is, blanks apart.

    Some templates drop it, and write an empty one before a thought that does not end.
    """
    end = _END_OF_THOUGHT.search(content)
    start = _THOUGHT.match(content)
    if end is None:
        return start is not None and not text.lstrip().startswith(content.strip())
    thought = content[start.end() if start else 0 : end.end()]
    return bool(thought[: -len(end[0])].strip()) and "".join(thought.split()) not in "".join(text.split())


def is_in_thought(before: str, text: str) -> bool:
    """Whether a prompt's text `before` opens a thought that the answer's `text` does not end."""
    tags = list(_THOUGHT.finditer(before[-40:]))
    opened = bool(tags) and not before[-40:][tags[-1].end() :].strip()
    return opened and not _END_OF_THOUGHT.search(text)


def _opened(before: str, content: str) -> int:
    """How many characters at the start of an answer the prompt's end has written already: a tag such as `<think>`."""
    for size in range(min(len(before), len(content)), 0, -1):
        if before.endswith(content[:size]) and _TAG.fullmatch(content[:size].strip()):
            return size
    tag = _TAG.match(content.lstrip())  # with other blanks around it
    if tag is None or not before.rstrip().endswith(tag[0]):
        return 0
    return len(content) - len(content.lstrip()) + tag.end()


def _hint(messages: list[dict]) -> str:
    if any(message["role"] in ("system", "developer") for message in messages):
        return "if it takes no system message, begin the first user message with that text, or use --chat-template FILE"
    return "roles must alternate in many templates; --skip-bad-rows skips such rows, --chat-template FILE replaces it"
