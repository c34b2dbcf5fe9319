"""Dialogues of Anthropic's HH (2204.05862): whole conversations as chosen and rejected, split before the last answer."""

from collections.abc import Iterable

from .sources import text_of

TURN, ASKED = "\n\nAssistant:", "\n\nHuman:"
HUB_ID = "Anthropic/hh-rlhf"


def split_dialogue(text: str) -> tuple[str, str] | None:
    """(prompt up to and including the last "\\n\\nAssistant:", answer); None for what is no such dialogue.

    A dialogue begins with the human, and its last answer holds text and no further turn.
    """
    prompt, turn, answer = text.rpartition(TURN)
    if not turn or not prompt.lstrip("\n").startswith("Human:") or not answer.strip() or ASKED in answer:
        return None
    return prompt + turn, answer


def preferences(rows: Iterable[tuple[int, dict]], prefix: str, place: str) -> tuple[list[dict], dict[str, int]]:
    """Preference rows of dialogue rows with `chosen` and `rejected`, and how many were left out for which reason.

    Raises InputError for a row without these columns, naming its place and line.
    """
    kept, counts = [], {"malformed": 0, "different_prompts": 0, "equal": 0}
    for line, row in rows:
        chosen, rejected = (_split(row, side, f"{place}:{line}") for side in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            counts["malformed"] += 1
        elif chosen[0] != rejected[0]:
            counts["different_prompts"] += 1
        elif chosen[1].strip() == rejected[1].strip():
            counts["equal"] += 1
        else:
            kept.append(
                {"prompt_id": f"{prefix}{line}", "prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}
            )
    return kept, counts


def _split(row: dict, side: str, place: str) -> tuple[str, str] | None:
    empty = side in row and not isinstance(
        row[side], str
    )  # one bad row among 161,000 is counted, a missing column is not
    return None if empty else split_dialogue(text_of(row, side, place))
