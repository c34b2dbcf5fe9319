"""Token ids that rows carry, so that what was sampled is never tokenised again.

A row stores `prompt_ids` and the ids of its completions, the fingerprint of their tokenizer, and in `texts` a
fingerprint of each text with its ids. Ids hold only for the texts that they were made for: where a text was edited, its
ids are not used.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .chats import Prompt, Text, prompt_of
from .tokens import interned

ID_FIELDS = ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "tokenizer", "texts")
_COMPLETIONS = ("completion", "chosen", "rejected")


def text_key(prompt: Prompt, prompt_ids: Sequence[int], completion: Text = "", ids: Sequence[int] = ()) -> str:
    """16 hex digits over a prompt, perhaps with a completion, and their ids."""
    content = json.dumps([prompt.key, list(prompt_ids), completion, list(ids)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def carried(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that belong to what is made from it: all but its ids."""
    return {name: value for name, value in row.items() if name not in ID_FIELDS}


def stored_prompt(row: Mapping[str, Any], tokenizer: str) -> list[int] | None:
    """The ids of a row's prompt, where they are those of this tokenizer (a fingerprint) and of this text."""
    ids = row.get("prompt_ids")
    if not ids or row.get("tokenizer") != tokenizer:
        return None
    held = text_key(prompt_of(row), ids) in row.get("texts", ())
    held = held or any(stored_completion(row, name, tokenizer) is not None for name in _COMPLETIONS)
    return interned(ids) if held else None


def stored_completion(row: Mapping[str, Any], name: str, tokenizer: str) -> tuple[list[int], list[int]] | None:
    """(prompt ids, completion ids) of a row's completion `name`, under the same conditions."""
    prompt_ids, ids = row.get("prompt_ids"), row.get(f"{name}_ids")
    if prompt_ids is None or ids is None or row.get("tokenizer") != tokenizer or row.get(name) is None:
        return None
    held = text_key(prompt_of(row), prompt_ids, row[name], ids) in row.get("texts", ())
    return (interned(prompt_ids), interned(ids)) if held else None


def exchanged(row: Mapping[str, Any], name: str, tokenizer: str) -> dict[str, Any] | None:
    """A row with the ids and the finish of its other completion under `name`, where `name` has the text of that one.

    So it is where chosen and rejected were exchanged in the texts alone; else None.
    """
    other = {"chosen": "rejected", "rejected": "chosen"}.get(name)
    if other is None:
        return None
    moved = {**row, f"{name}_ids": row.get(f"{other}_ids"), f"{name}_finish": row.get(f"{other}_finish")}
    return moved if stored_completion(moved, name, tokenizer) else None


def has_ids(row: Mapping[str, Any], tokenizer: str) -> bool:
    """Whether a row carries ids of this tokenizer, for whatever texts."""
    return row.get("tokenizer") == tokenizer and any(row.get(name) is not None for name in ID_FIELDS[:4])
