"""CNN/DailyMail articles: out-of-distribution prompts for summarisation policies (2305.18290, section 6.3)."""

from collections.abc import Iterable
from typing import Any

from ..config.files import Prepare
from ..errors import InputError
from .prepared import Prepared
from .sources import source_rows, text_of
from .tldr import prompt_of

HUB_ID, HUB_CONFIG = "abisee/cnn_dailymail", "3.0.0"


def prepare(config: Prepare) -> Prepared:
    """Test prompts alone, each an article with its highlights as reference."""
    rows = source_rows(config.source, HUB_ID, name=HUB_CONFIG, split="test", revision=config.revision)
    return Prepared({"prompts.test.jsonl": articles(rows, config.source or HUB_ID, _count(config))})


def plan(config: Prepare) -> dict[str, Any]:
    """What --dry-run shows."""
    return {"test prompts": _count(config), "source": config.source or HUB_ID}


def articles(rows: Iterable[tuple[int, dict]], place: str, limit: int | None) -> list[dict]:
    """Prompt rows from the first `limit` rows with `article` and `highlights`.

    Raises InputError naming `place` and line for a missing column, and where there are no rows.
    """
    found: list[dict] = []
    for line, row in rows:
        if len(found) == limit:
            break
        article = text_of(row, "article", f"{place}:{line}")
        highlights = text_of(row, "highlights", f"{place}:{line}")
        found.append(
            {
                "prompt_id": str(row.get("id", line)),
                "prompt": prompt_of(article),
                "reference": " " + " ".join(highlights.split()),
            }
        )
    if not found:
        raise InputError(f"{place}: no rows found", hint="articles are rows with `article` and `highlights`")
    return found


def _count(config: Prepare) -> int:
    return config.test_prompts if config.limit is None else min(config.limit, config.test_prompts)
