"""People as judges: which side a form shows as A, who answers what, and their exported answers as judgements."""

import random
from collections.abc import Sequence
from pathlib import Path

from .. import log
from ..errors import InputError
from ..outputs.files import write_atomic
from . import form
from .comparisons import Comparison
from .prompts import Criterion


def items(comparisons: Sequence[Comparison], seed: int) -> list[dict]:
    """The form's items, shuffled; nothing in them tells which candidate is A."""
    found = []
    for i, c in enumerate(comparisons):
        a, b = c.shown(c.orders[0])
        item = {"id": f"c{i}", "prompt_id": c.prompt_id, "prompt": c.prompt, "A": a, "B": b}
        found.append(item | ({"chat": True} if c.is_chat else {}))
    random.Random(f"form {seed}").shuffle(found)
    return found


def shares(items: Sequence[dict], annotators: int, overlap: float, seed: int) -> list[list[dict]]:
    """The items of each annotator: the share `overlap` of all for everybody, the others dealt out, as evenly as can be.

    One annotator has all items in their order; each of several an order of their own, so that fatigue does not
    coincide. Raises InputError where an annotator would have nothing to do.
    """
    if annotators == 1:
        return [list(items)]
    common = round(overlap * len(items))
    if common == 0 and len(items) < annotators:
        raise InputError(
            f"--annotators {annotators}: {len(items)} comparisons leave some of them without any",
            "use fewer --annotators, or a larger --overlap",
        )
    found = [[*items[:common], *items[common + n :: annotators]] for n in range(annotators)]
    for number, share in enumerate(found, start=1):
        random.Random(f"share {seed} {number}").shuffle(share)
    return found


def write_forms(
    path: str, items: Sequence[dict], shared: Sequence[Sequence[dict]], criterion: Criterion
) -> list[tuple[str, int]]:
    """(path, number of items) of each form: `path` itself, or with several shares FORM-1.html, FORM-2.html, ..."""
    one, written = Path(path), []
    one.parent.mkdir(parents=True, exist_ok=True)
    for number, share in enumerate(shared, start=1):
        several = len(shared) > 1
        file = one.with_name(f"{one.stem}-{number}{one.suffix}") if several else one
        page = form.page(items, share, number if several else 0, criterion.question, criterion.prompt_noun)
        write_atomic(file, page)
        written.append((str(file), len(share)))
    return written


def judgements(paths: Sequence[str], comparisons: Sequence[Comparison], seed: int, criterion: str) -> list[dict]:
    """The judgement rows of exported answers, file by file.

    Both bad is a tie with `both_bad`. Raises InputError for a file of another form, one without answers, and two of one
    person. A form that is answered in part is said.
    """
    form_items = items(comparisons, seed)
    rows: list[dict] = []
    files: dict[str, str] = {}
    for path in paths:
        answers = form.read_answers(path, form_items)
        person = answers.person
        if person in files:
            raise InputError(
                f"{path}: answers of '{person}', as {files[person]} has",
                hint="give one file per person: leave the older one out, or change `person` in one of them",
            )
        if not answers.choices:
            raise InputError(f"{path}: contains no answers", hint="the form's Export answers button writes them")
        files[person] = path
        if len(answers.choices) < answers.of:
            log.warn(f"{path}: {len(answers.choices)} of {answers.of} comparisons are answered")
        for item, choice in answers.choices.items():
            c, side = comparisons[int(item[1:])], "tie" if choice == "both_bad" else choice
            row = c.row(c.orders[0], side, criterion, f"human:{person}", choice)
            row |= {"both_bad": True} if choice == "both_bad" else {}
            rows.append(row | ({"comment": answers.comments[item]} if item in answers.comments else {}))
    return rows
