"""Anthropic's HH dialogues (2204.05862): pairs of conversations, split before the last answer."""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

from ..config.files import Prepare
from .preferences import preference_files, split_pairs
from .prepared import Prepared
from .sources import source_rows, text_of

HUB_ID = "Anthropic/hh-rlhf"
ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"


def prepare(config: Prepare) -> Prepared:
    """Preferences, their chosen answers as SFT rows, and prompts with the chosen answer as reference."""
    train, test, dropped = split_pairs(config, partial(_read, config))
    return Prepared(preference_files(config, train, test), dropped, metrics=dropped)


def plan(config: Prepare) -> dict[str, Any]:
    """What --dry-run shows."""
    return {
        "train prompts": config.train_prompts,
        "test prompts": config.test_prompts,
        "source": config.source or HUB_ID,
    }


def split_dialogue(text: str) -> tuple[str, str] | None:
    """(prompt up to and including the last "\\n\\nAssistant:", answer), or None for a malformed dialogue.

    A well-formed dialogue begins with the human; its last answer is not blank and contains no further turn.
    """
    prompt, turn, answer = text.rpartition(ASSISTANT)
    if not turn or not prompt.lstrip("\n").startswith("Human:") or not answer.strip() or HUMAN in answer:
        return None
    return prompt + turn, answer


def preferences(rows: Iterable[tuple[int, dict]], prefix: str, place: str) -> tuple[list[dict], dict[str, int]]:
    """(preference rows, rows dropped by reason) from dialogue rows with `chosen` and `rejected`.

    A prompt_id is `prefix` and the row's line. Raises InputError naming `place` and line for a missing column.
    """
    kept, dropped = [], {"malformed": 0, "different_prompts": 0, "equal": 0}
    for line, row in rows:
        chosen, rejected = (_split(row, side, f"{place}:{line}") for side in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            dropped["malformed"] += 1
        elif chosen[0] != rejected[0]:
            dropped["different_prompts"] += 1
        elif chosen[1].strip() == rejected[1].strip():
            dropped["equal"] += 1
        else:
            kept.append(
                {"prompt_id": f"{prefix}{line}", "prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}
            )
    return kept, dropped


def _read(config: Prepare, split: str) -> tuple[list[dict], dict[str, int]]:
    rows = source_rows(config.source, HUB_ID, split=split, revision=config.revision)
    return preferences(islice(rows, config.limit), f"{split}-", config.source or HUB_ID)


def _split(row: dict, side: str, place: str) -> tuple[str, str] | None:
    if side in row and not isinstance(row[side], str):
        return None  # a null among 161,000 rows is counted as malformed; a missing column is an error
    return split_dialogue(text_of(row, side, place))
