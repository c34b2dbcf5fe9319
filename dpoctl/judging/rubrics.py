"""Rubrics: several criteria that are asked in one request and answered by a labelled line each.

A file in YAML names them:

    criteria:
      accuracy: Which answer is more accurate?
      brevity: Which answer says it in fewer words?
    prompt_noun: question
    candidate_noun: answer
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .comparisons import Comparison
from .labels import labelled_value
from .replies import Answer, Reply
from .verdicts import CUT_THOUGHT, NO_LINE, Verdict, after_thought, read_verdict

SUFFIXES = (".yaml", ".yml")
_FIELDS = ("criteria", "prompt_noun", "candidate_noun")
_NAME = re.compile(r"[^\W\d_][\w -]{1,39}")  # a single letter could be a choice
_RESERVED = ("tie", "preferred", "score", "a or b")
_HINT = "criteria: followed by lines `NAME: QUESTION`; see dpoctl docs judging"


@dataclass(frozen=True)
class Rubric:
    """The question of each criterion by its name, and what prompts and candidates are called."""

    questions: dict[str, str]
    prompt_noun: str = "prompt"
    candidate_noun: str = "answer"


@dataclass(frozen=True)
class Lines:
    """The lines of an answer that decide: `labels` are the words in parentheses of each criterion's line, "" for none;
    `read(answer, label)` reads one. A request gives one row for each criterion."""

    labels: dict[str, str]
    read: Callable[[str, str], Verdict]

    def rows(self, c: Comparison, order: str, reply: Reply, judge: str) -> list[dict[str, Any]]:
        """The judgements in a reply; of a reply that holds none each is invalid, with the same reason."""
        written = isinstance(reply, Answer) and not reply.reason
        found = []
        for criterion, label in self.labels.items():
            verdict = self.read(reply.raw, label) if written else Verdict(None, reply.reason)
            row = c.row(order, verdict.choice, criterion, judge, reply.raw)
            found.append(row | ({"reason": verdict.reason.partition(":")[0]} if verdict.reason else {}))
        return found


def read_preference(answer: str, label: str) -> Verdict:
    """The verdict by one criterion: its last line `Preferred (LABEL): ...`, read as strictly as a single verdict."""
    text = after_thought(answer)
    if text is None:
        return Verdict(None, CUT_THOUGHT)
    value = labelled_value(text, "preferred", label, _is_choice)
    return Verdict(None, NO_LINE) if value is None else read_verdict(f"Preferred: {value}")


def _is_choice(value: str) -> bool:
    """Whether a line `LABEL: value` without the word is a verdict and no sentence about the criterion."""
    return bool(re.fullmatch(r"[\W_]*(?:(?:candidate|answer|response|option)[\W_]+)?(?:[AB]|tie)[\W_]*", value, re.I))


def load_rubric(path: str) -> Rubric:
    """Raises InputError for a file that is no YAML of this form, by the field that is wrong."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise InputError(f"{place}: not YAML ({getattr(e, 'problem', None) or e})", _HINT) from None
    if not isinstance(data, dict) or not isinstance(data.get("criteria"), dict) or not data["criteria"]:
        raise InputError(f"{path}: field 'criteria': expected one or more criteria by name", _HINT)
    if unknown := [str(name) for name in data if name not in _FIELDS]:
        raise InputError(f"{path}: field '{unknown[0]}': unknown", f"a rubric has {', '.join(_FIELDS)}")
    _check_names(path, list(data["criteria"]))
    for name, question in data["criteria"].items():
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{path}: criterion '{name}': expected its question, a text", _HINT)
        if slot := re.search(r"\{(prompt|a|b|fence|completion)\}", question):
            raise InputError(f"{path}: criterion '{name}': {slot[0]} in its question; only templates have slots", _HINT)
    nouns = {name: data[name] for name in _FIELDS[1:] if name in data}
    for name, noun in nouns.items():
        if not isinstance(noun, str) or not noun.strip():
            raise InputError(f"{path}: field '{name}': expected a text, such as 'answer'")
    questions = {name: " ".join(question.split()) for name, question in data["criteria"].items()}
    return Rubric(questions, **nouns)


def _check_names(path: str, names: list[Any]) -> None:
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
            expected = "2 to 40 letters, digits, spaces, - and _, with a letter first"
            raise InputError(f"{path}: criterion '{name}': expected a name of {expected}", _HINT)
        folded = re.sub(r"[\s_-]+", " ", name).lower()
        if folded in seen:
            raise InputError(f"{path}: criterion '{name}': another one has this name", "names must differ in letters")
        seen.add(folded)
