"""A blinded form for people: one self-contained page with keyboard control that remembers and exports its answers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import InputError

_TEMPLATES = Environment(
    loader=PackageLoader("dpoctl.judging"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


CHOICES = ("A", "B", "tie", "both_bad")


class Answers(NamedTuple):
    """What a person exported: `choices` and `comments` by the ids of the items; `of` is how many items were shown."""

    person: str
    choices: dict[str, str]
    comments: dict[str, str]
    of: int


def form_id(items: Sequence[dict]) -> str:
    """Identifies the comparisons of a form in its exported answers, by what it shows; its shares have the same one."""
    shown = [{name: item[name] for name in ("id", "prompt", "A", "B")} for item in items]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def page(items: Sequence[dict], share: Sequence[dict], number: int, question: str, prompt_noun: str) -> str:
    """The HTML of the form with one annotator's `share` of all `items`; `number` counts from 1, 0 where all are shown.

    Items are {"id", "prompt_id", "prompt", "A", "B"}, and "chat" of dialogues, in the order in which they are shown.
    Nothing in an item may tell which candidate is A. `prompt_noun` says what the prompts are, such as "news article".
    """
    preferences = not any(item.get("chat") for item in items)  # shown as text, which has lost the messages
    data = {"form": form_id(items), "share": number, "preferences": preferences, "items": share}
    template = _TEMPLATES.get_template("form.html.j2")
    return template.render(question=question, prompt_noun=prompt_noun, data=data)


def read_answers(path: str, items: Sequence[dict]) -> Answers:
    """The answers of an exported file, to a form of `items` or a share of them.

    Raises InputError for a file that is invalid, and for the answers to another form.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        person, form, answers = str(data["person"]), data["form"], dict(data["answers"])
        comments, of = dict(data.get("comments") or {}), int(data.get("of") or len(items))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        hint = "give a file that the form's Export answers button wrote"
        raise InputError(f"{path}: no exported answers ({type(e).__name__})", hint) from None
    if form != form_id(items):
        hint = "give the candidates, --seed and --criterion with which the form was written"
        raise InputError(f"{path}: answers to another form", hint)
    known = {item["id"] for item in items}
    invalid = [key for key, value in answers.items() if key not in known or value not in CHOICES]
    if invalid:
        expected = f"{', '.join(CHOICES[:-1])} or {CHOICES[-1]}"
        raise InputError(f"{path}: answer {invalid[0]}: expected {expected} for a comparison of the form")
    strange = [key for key, value in comments.items() if key not in known or not isinstance(value, str)]
    if strange:
        raise InputError(f"{path}: comment {strange[0]}: expected a text on a comparison of the form")
    return Answers(person, answers, comments, of)
