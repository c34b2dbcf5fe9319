"""Summaries: Reddit posts with TL;DR summaries and comparisons (2009.01325), CNN/DailyMail articles out of distribution."""

from collections.abc import Iterable

from ..errors import InputError
from .sources import text_of

COMPARISONS, TLDR = "CarperAI/openai_summarize_comparisons", "CarperAI/openai_summarize_tldr"
CNN_DM = "abisee/cnn_dailymail"
CUE = "TL;DR:"


def prompt_of(post: str) -> str:
    """The post, ending in the cue that a summary follows."""
    post = post.rstrip()
    return post if post.endswith(CUE) else f"{post}\n{CUE}"


def summary(text: str) -> str:
    """The summary as it follows the cue: without a cue of its own, after one space."""
    return " " + text.strip().removeprefix(CUE).strip()


def comparisons(rows: Iterable[tuple[int, dict]], prefix: str, place: str) -> tuple[list[dict], dict[str, int]]:
    """Preference rows of rows with `prompt`, `chosen`, `rejected`; equal and empty ones are left out and counted."""
    kept, counts = [], {"equal": 0, "empty": 0}
    for line, row in rows:
        prompt, chosen, rejected = (text_of(row, name, f"{place}:{line}") for name in ("prompt", "chosen", "rejected"))
        sides = {"chosen": summary(chosen), "rejected": summary(rejected)}
        if not prompt.strip() or not all(side.strip() for side in sides.values()):
            counts["empty"] += 1
        elif sides["chosen"] == sides["rejected"]:
            counts["equal"] += 1
        else:
            kept.append({"prompt_id": f"{prefix}{line}", "prompt": prompt_of(prompt)} | sides)
    return kept, counts


def posts(rows: Iterable[tuple[int, dict]], prefix: str, place: str) -> list[dict]:
    """Prompt rows with the human summary as `reference`, of rows with `prompt` and `label`."""
    return [
        {
            "prompt_id": f"{prefix}{line}",
            "prompt": prompt_of(text_of(row, "prompt", f"{place}:{line}")),
            "reference": summary(text_of(row, "label", f"{place}:{line}")),
        }
        for line, row in rows
    ]


def articles(rows: Iterable[tuple[int, dict]], place: str, limit: int | None) -> list[dict]:
    """Prompt rows with the highlights as `reference`, of rows with `article` and `highlights`."""
    found = []
    for line, row in rows:
        if len(found) == limit:
            break
        article = text_of(row, "article", f"{place}:{line}")
        reference = text_of(row, "highlights", f"{place}:{line}")
        found.append(
            {
                "prompt_id": str(row.get("id", line)),
                "prompt": prompt_of(article),
                "reference": " " + " ".join(reference.split()),
            }
        )
    if not found:
        raise InputError(f"{place}: holds no rows", hint="articles are rows with `article` and `highlights`")
    return found
