"""A blinded form for people: one self-contained page with keyboard control that remembers and exports its answers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import InputError

_TEMPLATES = Environment(
    loader=PackageLoader("dpoctl.judging"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def form_id(items: Sequence[dict]) -> str:
    """Identifies a form in its exported answers, by what it shows."""
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:16]


def page(items: Sequence[dict], question: str, prompt_noun: str) -> str:
    """The page's HTML; `items` are {"id", "prompt", "A", "B"} in the order in which they are shown.

    Nothing in an item may tell which candidate is A. `prompt_noun` says what the prompts are, such as "news article".
    """
    data = {"form": form_id(items), "items": items}
    template = _TEMPLATES.get_template("form.html.j2")
    return template.render(question=question, prompt_noun=prompt_noun, data=data)


def read_answers(path: str, items: Sequence[dict]) -> tuple[str, dict[str, str]]:
    """(person, item id -> `A`, `B` or `tie`) of an exported file.

    Raises InputError for a file that is invalid, and for the answers to another form.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        person, form, answers = str(data["person"]), data["form"], dict(data["answers"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        hint = "give a file that the form's Export button wrote"
        raise InputError(f"{path}: no exported answers ({type(e).__name__})", hint) from None
    if form != form_id(items):
        hint = "give the candidates, --seed and --criterion with which the form was written"
        raise InputError(f"{path}: answers to another form", hint)
    known = {item["id"] for item in items}
    invalid = [key for key, value in answers.items() if key not in known or value not in ("A", "B", "tie")]
    if invalid:
        raise InputError(f"{path}: answer {invalid[0]}: expected A, B or tie for a comparison of the form")
    return person, answers
