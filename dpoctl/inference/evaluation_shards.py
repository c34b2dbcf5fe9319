"""Evaluation rows of a part of the prompts, which a shard of evaluate writes, and the rows of all prompts from them.

Means over prompts are pooled with their standard errors, to rounding. What a mean does not tell, such as the number of
tokens, a row has in the field `part` until the shards are merged. Without torch.
"""

import math
from collections.abc import Sequence
from typing import Any

from .text_statistics import distinct_n

PART = "part"
_OVER_PROMPTS = ("reward", "length", "kl", "kl_exact")
_OVER_COMPLETIONS = ("ended", "repetition")
_OVER_TOKENS = {"perplexity_ref": "tokens", "perplexity_lm": "lm_tokens"}  # field -> what counts it


def part_of(texts: Sequence[str], prompt_ids: Sequence[str], tokens: int, lm_tokens: int) -> dict[str, Any]:
    """What the row of a part needs beside its means: prompts, tokens by model and by --lm, and the texts."""
    return {"prompts": len(set(prompt_ids)), "tokens": tokens, "lm_tokens": lm_tokens, "texts": list(texts)}


def pooled(parts: Sequence[tuple[float, float | None, int]]) -> tuple[float, float]:
    """(mean, standard error) of all values, from (mean, standard error, number of values) of each part of them.

    A part of one value has no error (None or nan).
    """
    n = sum(count for _, _, count in parts)
    mean = sum(part * count for part, _, count in parts) / n
    squares = sum((part - mean) ** 2 * count for part, _, count in parts)
    squares += sum(error**2 * count * (count - 1) for _, error, count in parts if count > 1 and error is not None)
    return mean, math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan


def merged(shards: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The evaluation rows of all prompts from the rows of each shard: one for each model, then those of files.

    A shard with prompts has a row with `part` for each model, in the order of the models. Rows without `part` are
    complete: those of files.
    """
    parts = [found for rows in shards if (found := [row for row in rows if PART in row])]
    files = [row for rows in shards for row in rows if PART not in row]
    return [_row(of_model) for of_model in zip(*parts, strict=True)] + files


def _row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a model from those of its parts."""
    row = {name: value for name, value in rows[0].items() if name != PART}
    parts = [part[PART] for part in rows]
    for name in _OVER_PROMPTS:
        if row.get(name) is not None:
            values = [(r[name], r[f"{name}_se"], p["prompts"]) for r, p in zip(rows, parts, strict=True)]
            row[name], row[f"{name}_se"] = pooled(values)
    for name in _OVER_COMPLETIONS:
        row[name] = sum(r[name] * r["n"] for r in rows) / sum(r["n"] for r in rows)
    for name, counted in _OVER_TOKENS.items():
        if row.get(name) is not None:
            total = sum(math.log(r[name]) * p[counted] for r, p in zip(rows, parts, strict=True))
            row[name] = math.exp(total / sum(p[counted] for p in parts))
    texts = [text for part in parts for text in part["texts"]]
    row |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    return row | {"n": sum(r["n"] for r in rows)}
