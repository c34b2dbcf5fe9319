"""The shapes of rows that people have, mapped to dpoctl's fields: UltraFeedback, Orca, Alpaca, ShareGPT and others.

What maps without doubt is mapped and said once for a file. A column that belongs to the prompt and is not used is told.
"""

from contextlib import suppress
from os import PathLike
from typing import Any

from ..log import say, warn
from .columns import Columns, apply_columns, check_columns
from .fields import BadRow
from .jsonl import named
from .messages import as_messages, read_json_field
from .tables import is_csv, typed

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"  # open the turns of dialogues in the Anthropic HH format
TEXTS = ("prompt", "completion", "chosen", "rejected", "messages", "text", "reference")

# field -> the columns that hold it under other names, those of one entry being alternatives
_PROMPTS = ("instruction", "question")
_COMPLETIONS = ("output", "response", "answer")
_SYSTEMS = ("system", "system_prompt")
_DIALOGUES = ("conversations", "conversation")
_SCORES = {
    "score_chosen": "chosen_score",
    "score_rejected": "rejected_score",
    "chosen-rating": "chosen_score",
    "rejected-rating": "rejected_score",
    "chosen_rating": "chosen_score",
    "rejected_rating": "rejected_score",
}
_BLANK_IF_NULL = (*_SYSTEMS, "input")
# columns that are mapped, or, where they are left over, may belong to the prompt
_OF_PROMPT = (*_SYSTEMS, *_PROMPTS, "input", "query", "context", "history", "documents", "passage", "background")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_KNOWN = {*_OF_PROMPT, *_COMPLETIONS, *_DIALOGUES, *_SCORES, *_MEDIA, "tools", "chat_template_kwargs", "label"}
_TOOLS, _KWARGS = "a list of tools, or the same as JSON text", "an object of template arguments"


class Shapes:
    """Maps the rows of one file, of the kind text, prompts, completions or preferences, to the fields of that kind."""

    def __init__(self, path: str | PathLike, kind: str, columns: Columns, *, silent: bool = False):
        self.path, self.kind, self.columns = path, kind, columns
        self.is_first, self.silent, self.is_csv = not silent, silent, is_csv(path)
        self.used: dict[tuple[tuple[str, ...], str], None] = {}  # which columns were mapped to what
        self.unused: dict[str, None] = {}  # columns that may belong to the prompt

    def __call__(self, row: dict) -> dict:
        """The row in dpoctl's fields. Raises BadRow where a column cannot be read, InputError for unknown --columns."""
        if self.columns:
            if self.is_first:
                check_columns(self.columns, row, self.path, self.kind)
            row = apply_columns(self.columns, row)
            if self.is_csv:  # cells were read by the names of their columns
                row |= {f: typed(f, row[f]) for f in self.columns if isinstance(row.get(f), str)}
        self.is_first = False
        if self.kind in ("evaluations", "judgements"):
            return row
        return row if _is_plain(row) else self._mapped(dict(row))

    def _normal(self, row: dict) -> dict:
        for name in TEXTS:
            if row.get(name) is not None:
                row[name] = as_messages(row[name], name)
        return row

    def _mapped(self, row: dict) -> dict:
        row = self._normal(row)
        for name in _BLANK_IF_NULL:  # a table has null where a text file has "": rows of one file have one shape
            if name in row and row[name] is None:
                row[name] = ""
        for name, kind, expected in (("tools", list, _TOOLS), ("chat_template_kwargs", dict, _KWARGS)):
            if name in row:
                read_json_field(row, name, kind, expected)
        self._map_scores(row)
        answered = any(row.get(name) is not None for name in ("text", "completion", "messages"))
        if self.kind == "text" and (row.get("text") is not None or (row.get("chosen") is not None and not answered)):
            if row.get("text") is not None:
                self._tell_unused(row)
            return row  # nothing to add, or preferences, which the check refuses
        self._map_dialogue(row)
        said: list[str] = []
        chat = self._map_names(row, said)
        chat = self._map_system(row, said) or chat
        if chat:
            _as_chat(row)
        if said:
            self._say(tuple(dict.fromkeys(said)), f"{self._target(row)}{' (messages)' if chat else ''}")
        self._tell_unused(row)
        return row

    def _target(self, row: dict) -> str:
        if self._is_messages(row):
            return "messages"
        return "chosen, rejected" if _has_dialogue(row) else "prompt"

    def _is_messages(self, row: dict) -> bool:
        """Whether the row is read as one dialogue."""
        return self.kind == "text" and row.get("messages") is not None and row.get("completion") is None

    def _map_scores(self, row: dict) -> None:
        for name, field in _SCORES.items():
            value = row.get(name)
            if value is None or row.get(field) is not None:
                continue
            if isinstance(value, str):
                with suppress(ValueError):
                    value = float(value)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self._tell(name, f"column '{name}' is not used: {named(value)} is no number")
                continue
            row[field] = value
            del row[name]
            self._say((name,), field)

    def _map_dialogue(self, row: dict) -> None:
        """A dialogue of ShareGPT: the prompt of preferences and prompts, else messages."""
        field = (
            "messages"
            if self.kind in ("text", "completions", "samples") and row.get("completion") is None
            else "prompt"
        )
        name = next((name for name in _DIALOGUES if row.get(name) is not None), None)
        if name is not None and row.get(field) is None and row.get("messages") is None:
            dialogue = as_messages(row[name], name)
            if isinstance(dialogue, list):
                self._check_open(dialogue, name, row)
                row[field] = dialogue
                del row[name]
                self._say((name,), field)
        messages = row.get("messages")
        if self.kind == "prompts" and row.get("prompt") is None and isinstance(messages, list) and not _is_pair(row):
            self._check_open(messages, "messages", row)
            row["prompt"] = row.pop("messages")
            self._say(("messages",), "prompt")

    def _check_open(self, dialogue: list, name: str, row: dict) -> None:
        """A dialogue that is to be answered may not end with an answer: BadRow."""
        last = dialogue[-1] if dialogue else None
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        if self.kind == "prompts" and answered and not _is_pair(row):
            hint = "leave the last answer out, or give the rows a 'prompt'"
            raise BadRow(name, "a last message that is to be answered", "one of role 'assistant'", hint)

    def _map_names(self, row: dict, said: list[str]) -> bool:
        """Give prompt and completion their names; whether the row is Alpaca's, which is a chat."""
        if self._is_messages(row) or _has_dialogue(row):
            return False
        chat = False
        if row.get("prompt") is None:
            present = [name for name in _PROMPTS if isinstance(row.get(name), str)]
            if len(present) > 1:
                hint = f"say which: --columns prompt={present[0]}, or prompt={'+'.join(present)} for both"
                raise BadRow("prompt", "one column", f"{' and '.join(map(repr, present))}", hint)
            name = present[0] if present else "input" if isinstance(row.get("input"), str) else None
            if name is None:
                return False
            row["prompt"] = row.pop(name)
            said.append(name)
            chat = name == "instruction"
        if self.kind in ("text", "completions", "samples", "unpaired"):
            self._map_completion(row)
        if isinstance(row.get("input"), str) and isinstance(row.get("prompt"), str):
            more = row.pop("input")
            row["prompt"] += f"\n{more}" if more.strip() else ""
            said += ["input"] if said else ["prompt", "input"]
            chat = True
        if _answered_by_messages(row):
            said += [] if said else ["prompt"]
            chat = True
        return self._map_history(row, said) or chat

    def _map_completion(self, row: dict) -> None:
        names = [name for name in _COMPLETIONS if isinstance(row.get(name), str)]
        if row.get("completion") is None and len(names) == 1:
            row["completion"] = row.pop(names[0])
            self._say((names[0],), "completion")

    def _map_history(self, row: dict, said: list[str]) -> bool:
        """Earlier turns of Alpaca's form, pairs of question and answer; whether there are some."""
        turns = row.get("history")
        if not isinstance(turns, list) or not isinstance(row.get("prompt"), str):
            return False
        if not all(isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) for x in t) for t in turns):
            return False
        del row["history"]
        if not turns:
            return False
        roles = ("user", "assistant")
        before = [_said_by(role, text) for turn in turns for role, text in zip(roles, turn, strict=True)]
        row["prompt"] = [*before, _said_by("user", row["prompt"])]
        said.append("history")
        return True

    def _map_system(self, row: dict, said: list[str]) -> bool:
        """Put the system column before the dialogue; whether the row has one, which makes it a chat."""
        name = next((name for name in _SYSTEMS if isinstance(row.get(name), str)), None)
        if name is None:
            return False
        text = row[name]
        dialogues = ["prompt"] if row.get("prompt") is not None and not _has_dialogue(row) else ["chosen", "rejected"]
        if self._is_messages(row):
            dialogues = ["messages"]
        if not text.strip():
            del row[name]
            return dialogues == ["prompt"]
        if dialogues == ["prompt"] and isinstance(row["prompt"], str):
            row["prompt"] = [_said_by("user", row["prompt"])]
            said += [] if said else ["prompt"]
        if not all(isinstance(row.get(field), list) and row[field] for field in dialogues):
            return False  # told as a column that is not used
        for field in dialogues:
            first = row[field][0]
            if isinstance(first, dict) and first.get("role") in ("system", "developer"):
                if first.get("content") != text:
                    raise BadRow(name, f"the system message of '{field}', or none", "another text")
            else:
                row[field] = [_said_by("system", text), *row[field]]
        del row[name]
        said.insert(0, name)
        return dialogues == ["prompt"]

    def _tell_unused(self, row: dict) -> None:
        if self.silent:
            return
        for name in _OF_PROMPT:
            value = row.get(name)
            if not value or (isinstance(value, str) and not value.strip()):
                continue
            both = f"{name}+prompt" if isinstance(row.get("prompt"), str) else name
            hint = f"--columns prompt={both} would make it part of the prompt"
            if self.kind == "text" and row.get("text") is not None:
                hint = "the rows are read as their 'text'"
            self._tell(name, f"column '{name}' is not used; {hint}")
        dialogue = row.get("messages" if self._is_messages(row) else "chosen" if _has_dialogue(row) else "prompt")
        if row.get("tools") and not isinstance(dialogue, list):
            self._tell("tools", "'tools' are not used: the rows are text, and tools belong to lists of messages")
        for name in _MEDIA:
            if row.get(name):
                self._tell(name, f"column '{name}' is not used: dpoctl reads the text of such rows alone")
        if self.kind == "text" and row.get("label") is not None and row.get("completion") is not None:
            self._tell("label", "column 'label' is not used: answers count alike, whatever their label")
        if self.kind == "text" and isinstance(row.get("messages"), list):
            if any(isinstance(m, dict) and m.get("weight", 1) == 0 for m in row["messages"]):
                self._tell("weight", "'weight' of messages is not used: answers of weight 0 count too")

    def _tell(self, name: str, words: str) -> None:
        """Warn once of a column that is not used."""
        if name not in self.unused and not self.silent:
            self.unused[name] = None
            warn(f"{self.path}: {words}")

    def _say(self, names: tuple[str, ...], field: str) -> None:
        """Say once what is mapped; a row in which some of the columns are blank says nothing new."""
        if not self.silent and not any(set(names) <= set(said) and field == to for said, to in self.used):
            self.used[names, field] = None
            say(f"{self.path}: {', '.join(names)} -> {field}")


def _as_chat(row: dict) -> None:
    """Prompt and answers as messages. Token ids of the row were those of other texts."""
    if isinstance(row.get("prompt"), str):
        row["prompt"] = [_said_by("user", row["prompt"])]
    for name in ("completion", "chosen", "rejected"):
        if isinstance(row.get(name), str):
            row[name] = [_said_by("assistant", row[name])]
    for name in ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids"):
        row.pop(name, None)


def _answered_by_messages(row: dict) -> bool:
    """Whether a prompt of text has an answer of messages, which makes it the user's message."""
    answers = [row.get(name) for name in ("completion", "chosen", "rejected")]
    first = [answer[0] for answer in answers if isinstance(answer, list) and answer]
    is_answer = bool(first) and all(isinstance(m, dict) and m.get("role") == "assistant" for m in first)
    return is_answer and isinstance(row.get("prompt"), str)


def _said_by(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _is_plain(row: dict) -> bool:
    """Whether a row has no column that is mapped, and only text that is no JSON: most rows, of files of any length."""
    if not _KNOWN.isdisjoint(row):
        return False
    for name in TEXTS:
        value = row.get(name)
        if value and (not isinstance(value, str) or value.lstrip()[:1] in ("[", "{")):
            return False
    return True


def _is_pair(row: dict) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _has_dialogue(row: dict) -> bool:
    """Whether chosen and rejected hold the whole dialogue, so that the row needs no prompt."""
    chosen = row.get("chosen")
    if isinstance(chosen, list):
        return bool(chosen) and isinstance(chosen[0], dict) and chosen[0].get("role") != "assistant"
    return isinstance(chosen, str) and row.get("prompt") is None and ASSISTANT in chosen
