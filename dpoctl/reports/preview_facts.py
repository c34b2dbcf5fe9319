"""What preview tells of a file: shapes, columns, lengths, and what is cut, dropped, repeated or refused."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from ..data.duplicates import count_duplicates
from ..data.encode import Limits
from ..data.schema import shape_of
from .preview_rows import Encoded, Setting, TokenSequence, read, stops_of

Facts = dict[str, Any]

_BINS = 8
_STEPS = (1, 2, 5)  # a bin's width is one of these times a power of ten
_CHAT = ("tools", "chat_template_kwargs")
_FIELDS = {"text": ("text",), "completion": ("prompt", "completion"), "messages": ("messages",)}


def facts_of(found: Encoded, setting: Setting) -> Facts:
    """The facts of a file, as --json prints them.

    `lengths` are of sequences before anything is cut; `over` counts those above each limit. `repeated` rows have the
    prompt of another row, and are left out. `misordered` pairs have the higher score rejected, `contradictions` are in
    the file the other way round too. `without_end` counts answers whose last token does not end them.
    """
    config, rows = setting.config, found.rows
    facts: Facts = {
        "file": config.data,
        "for": config.for_,
        "model": config.model,
        "ends": setting.codec.describe_ends(),
        "rows": len(rows.rows),
        "shapes": dict(Counter(_shape(row, setting) for row in rows.rows)),
        "columns": _columns(rows.rows, setting),
        "skipped": found.skipped,
        "repeated": rows.repeated,
        "counts": {name: n for name, n in found.counts.items() if name not in found.skipped},
        "limits": _limits(setting),
        "lengths": _lengths(found, setting),
        "prompts": len({_prompt_key(s) for of_row in found.sequences.values() for s in of_row}),
    }
    if setting.kind == "preferences" and not config.field:
        facts |= _scores(rows.rows) | {"contradictions": count_duplicates(rows.rows)["contradictions"]}
    if setting.unpaired:
        facts["labels"] = _labels(found)
    if setting.kind != "prompts":
        answers = [
            span
            for row, line in zip(rows.rows, rows.lines, strict=True)
            for sequence in found.sequences[line]
            for span in sequence.spans(setting.codec, stops_of(row, setting.codec))
            if span.kind == "answer"
        ]
        facts |= {"answers": len(answers), "without_end": sum(not span.ended for span in answers)}
    facts["repeated_prompts"] = _repeated(found, setting)
    facts["problem"] = found.error and found.error.message
    return facts


# --- rows and columns


def _shape(row: dict, setting: Setting) -> str:
    """The fields of a row with the form of their values: `prompt, chosen, rejected as messages`."""
    names = _names(row, setting)
    forms = ["messages" if isinstance(row.get(name), list) else "text" for name in names]
    if len(set(forms)) > 1:
        return ", ".join(f"{name} as {form}" for name, form in zip(names, forms, strict=True))
    return names[0] if names in (["text"], ["messages"]) else f"{', '.join(names)} as {forms[0]}"


def _names(row: dict, setting: Setting) -> list[str]:
    """The fields that hold a row's texts."""
    if setting.kind == "prompts":
        return ["prompt"]
    if setting.config.field:
        return ["prompt", setting.config.field]
    if setting.unpaired:
        return ["prompt", "completion"]
    return ["prompt", "chosen", "rejected"] if setting.kind == "preferences" else list(_FIELDS[shape_of(row) or "text"])


def _read(row: dict, setting: Setting) -> set[str]:
    """The fields of a row that decide what the command does with it."""
    names = set(_names(row, setting))
    if setting.kind == "prompts":
        return names | {*_CHAT, "prompt_id", "prompt_ids", "tokenizer", "texts"}
    if names & {"text", "messages"}:
        return names | {"finish"} | (set(_CHAT) if "messages" in names else set())
    found = names | {*_CHAT, "prompt_ids", "tokenizer", "texts"}
    for name in names - {"prompt"}:
        found |= {f"{name}_ids", "finish" if name == "completion" else f"{name}_finish"}
    if setting.unpaired:
        return found | {"label"} | (set() if setting.config.threshold is None else {"score"})
    return found | ({"margin"} if setting.config.for_ == "train-rm" else set())


def _columns(rows: Sequence[dict], setting: Setting) -> dict[str, dict[str, int]]:
    """How many rows have a value in each column that is used, and in each that is not."""
    found: dict[str, Counter[str]] = {"used": Counter(), "ignored": Counter()}
    for row in rows:
        read_here = _read(row, setting)
        for name, value in row.items():
            if value is not None:
                found["used" if name in read_here else "ignored"][name] += 1
    return {name: dict(counter) for name, counter in found.items()}


def _scores(rows: Sequence[dict]) -> dict[str, int]:
    scores = [(row.get("chosen_score"), row.get("rejected_score")) for row in rows]
    known = [(a, b) for a, b in scores if a is not None and b is not None]
    return {"scored": len(known), "ties": sum(a == b for a, b in known), "misordered": sum(a < b for a, b in known)}


def _labels(found: Encoded) -> dict[str, dict[str, int]]:
    """The completions of each label, and their tokens that are trained on."""
    kinds: dict[str, dict[str, int]] = {}
    for kind in ("desirable", "undesirable"):
        of_kind = [s.example for of_row in found.sequences.values() for s in of_row if s.name == kind]
        kinds[kind] = {"completions": len(of_kind), "tokens": sum(example.trained for example in of_kind)}
    return kinds


# --- lengths


def _limits(setting: Setting) -> dict[str, int | None]:
    if setting.kind == "prompts":
        return {"prompt": setting.limits.prompt, "context": setting.context}
    return {"prompt": setting.limits.prompt, "total": setting.limits.length}


def _lengths(found: Encoded, setting: Setting) -> dict[str, Facts]:
    config = setting.config
    sequences = [s for of_row in found.unlimited.sequences.values() for s in of_row]
    # a pair's prompt is counted once
    prompts = [s.example.start for s in sequences if s.name != "text" and (config.field or s.name != "rejected")]
    totals = [len(s.example.ids) for s in sequences] if setting.kind != "prompts" else []
    limits = setting.limits
    lengths = (("prompt", prompts, limits.prompt), ("total", totals, limits.length))
    return {name: _length(values, limit) for name, values, limit in lengths if values}


def _length(values: list[int], limit: int | None) -> Facts:
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
        "over": None if limit is None else sum(value > limit for value in values),
        "histogram": histogram(values),
    }


def histogram(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """(lowest, highest, how many) of at most 8 bins of one width, which is 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    widths = (step * 10**power for power in range(12) for step in _STEPS)
    width = next(w for w in widths if high // w - low // w < _BINS)
    counted = Counter(value // width for value in values)
    return [(n * width, (n + 1) * width - 1, counted[n]) for n in range(low // width, high // width + 1)]


# --- prompts that repeat


def _prompt_key(sequence: TokenSequence) -> tuple[int, ...]:
    """What sequences with the same prompt have in common; of a text without a prompt, all of it."""
    example = sequence.example
    return tuple(example.ids if sequence.name == "text" else example.ids[: example.start])


def _repeated(found: Encoded, setting: Setting) -> dict[str, dict[str, int]]:
    """File -> its rows, and how many of them have a prompt that DATA has."""
    config = setting.config
    known = {_prompt_key(sequence) for of_row in found.sequences.values() for sequence in of_row}
    sampled = setting._replace(
        config=replace(config, for_="sample", field=None),
        limits=Limits(prompt=config.max_prompt_length),
        unpaired=False,
    )
    result = {}
    for path, how in ((config.eval_data, setting), (config.eval_prompts, sampled)):
        if path is not None:
            rows = [of_row for of_row in read(path, how).sequences.values() if of_row]
            shared = sum(any(_prompt_key(sequence) in known for sequence in of_row) for of_row in rows)
            result[path] = {"rows": len(rows), "repeated": shared}
    return result
