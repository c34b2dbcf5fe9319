"""People as judges: which side a form shows as A, and their exported answers as judgements."""

import random
from collections.abc import Sequence

from ..errors import InputError
from . import form
from .comparisons import Comparison


def items(comparisons: Sequence[Comparison], seed: int) -> list[dict]:
    """The form's items, shuffled; nothing in them tells which candidate is A."""
    found = []
    for i, c in enumerate(comparisons):
        a, b = c.shown(c.orders[0])
        found.append({"id": f"c{i}", "prompt": c.prompt, "A": a, "B": b})
    random.Random(f"form {seed}").shuffle(found)
    return found


def judgements(paths: Sequence[str], comparisons: Sequence[Comparison], seed: int, criterion: str) -> list[dict]:
    """The judgement rows of exported answers, file by file.

    Raises InputError for a file of another form, one without answers, and two of one person.
    """
    form_items = items(comparisons, seed)
    rows: list[dict] = []
    files: dict[str, str] = {}
    for path in paths:
        person, answers = form.read_answers(path, form_items)
        if person in files:
            raise InputError(
                f"{path}: answers of '{person}', as {files[person]} has",
                hint="give one file per person: leave the older one out, or change `person` in one of them",
            )
        if not answers:
            raise InputError(f"{path}: contains no answers", hint="the form's Export button writes them")
        files[person] = path
        for item, choice in answers.items():
            c = comparisons[int(item[1:])]
            rows.append(c.row(c.orders[0], choice, criterion, f"human:{person}", choice))
    return rows
