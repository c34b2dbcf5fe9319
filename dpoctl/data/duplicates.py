"""What rows have in common: duplicates, equal pairs, and prompts that are in training and evaluation files."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .schema import shape_of

_CONTEXT = ("tools", "chat_template_kwargs")  # what a prompt's tokens depend on, besides its text
_TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")


def prompt_key(row: dict) -> bytes:
    """A digest that two rows share where their prompts are equal; of rows without a prompt, of their whole text."""
    prompt = row.get("prompt")
    if shape_of(row) == "messages":
        prompt = row["messages"][:-1]
    elif prompt is None:
        prompt = row.get("text")
    return _key([prompt, *(row.get(name) for name in _CONTEXT)])


def count_duplicates(rows: Iterable[dict]) -> dict[str, int]:
    """Counts over checked rows: `prompts` that differ; `duplicate_rows`, whose texts an earlier row has; `equal_pairs`,
    whose chosen and rejected are equal; `contradictions`, pairs that an earlier row ranks the other way round."""
    prompts: set[bytes] = set()
    seen: set[bytes] = set()
    counts: Counter[str] = Counter(duplicate_rows=0, equal_pairs=0, contradictions=0)
    for row in rows:
        prompt = prompt_key(row)
        prompts.add(prompt)
        key = _key([row.get(name) for name in (*_TEXTS, *_CONTEXT)])
        counts["duplicate_rows"] += key in seen
        seen.add(key)
        if row.get("chosen") is not None and row.get("rejected") is not None:
            counts["equal_pairs"] += row["chosen"] == row["rejected"]
            flipped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
            other = _key([flipped.get(name) for name in (*_TEXTS, *_CONTEXT)])
            counts["contradictions"] += other in seen and row["chosen"] != row["rejected"]
    return {"prompts": len(prompts)} | dict(counts)


def count_shared(held_out: Iterable[dict], training: Iterable[dict]) -> int:
    """How many held-out rows have a prompt, or without prompts a text, that is trained on."""
    known = {prompt_key(row) for row in training}
    return sum(prompt_key(row) in known for row in held_out)


def _key(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
