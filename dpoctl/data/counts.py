"""The counts of what was encoded, in words: one line of a log."""

from collections.abc import Mapping

WORDS = {  # count -> how it is said, in the order of the line
    "truncated": "truncated",
    "split": "split",
    "dropped": "dropped as too long",
    "too_short": "too short to train on",
    "equal_dropped": "dropped as equal completions",
    "empty_dropped": "dropped as empty",
    "refused": "refused by the chat template",
    "in_thought": "are read as a thought",
    "special_text": "spell a special token",
    "from_ids": "use stored token ids",
    "ids_not_used": "have stored ids of other texts",
}


def in_words(counts: Mapping[str, int]) -> str:
    """The counts that are not 0, such as "3 truncated, 1 refused by the chat template"; empty where all are 0."""
    return ", ".join(f"{counts[name]} {words}" for name, words in WORDS.items() if counts.get(name))
