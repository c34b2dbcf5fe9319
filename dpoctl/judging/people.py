"""People as judges: which side a form shows as A, and their exported answers as judgements."""

import random
from collections.abc import Sequence

from ..errors import InputError
from . import form
from .comparisons import Comparison


def items(config, comparisons: Sequence[Comparison]) -> list[dict]:
    """The form's items in the order they are shown, with nothing that names a side."""
    found = []
    for i, c in enumerate(comparisons):
        a, b = c.shown(c.orders[0])
        found.append({"id": f"c{i}", "prompt": c.prompt, "A": a, "B": b})
    random.Random(f"form {config.seed}").shuffle(found)
    return found


def judgements(config, comparisons: Sequence[Comparison]) -> dict[str, list[dict]]:
    """Judge -> its rows, of the files of --answers.

    Raises InputError for a file that is not this form's, one without answers, and two by one name.
    """
    own_items = items(config, comparisons)
    rows: dict[str, list[dict]] = {}
    files: dict[str, str] = {}
    for path in config.answers:
        person, answers = form.read_answers(path, own_items)
        judge = f"human:{person}"
        if judge in rows:
            raise InputError(
                f"{path}: by '{person}', as {files[judge]} is",
                hint="one file a person: leave the older one out, or give `person` in the file another name",
            )
        if not answers:
            raise InputError(f"{path}: holds no answers", hint="the form's Export button writes them")
        files[judge] = path
        chosen = [(comparisons[int(item[1:])], choice) for item, choice in answers.items()]
        rows[judge] = [c.row(config, c.orders[0], choice, judge, choice) for c, choice in chosen]
    return rows
