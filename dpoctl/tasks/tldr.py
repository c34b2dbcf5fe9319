"""Reddit TL;DR summarisation (2009.01325): comparisons of summaries, and posts with human-written ones."""

import random
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

from ..config.files import Prepare
from .preferences import preference_files, split_pairs
from .prepared import Prepared
from .sources import source_rows, text_of

COMPARISONS_HUB_ID = "CarperAI/openai_summarize_comparisons"
POSTS_HUB_ID = "CarperAI/openai_summarize_tldr"
CUE = "TL;DR:"


def prepare(config: Prepare) -> Prepared:
    """Preferences from the comparisons; SFT rows, and prompts with a reference, from the posts.

    A --source file holds either or both: rows with `chosen` are comparisons, rows with `label` are posts. Without any
    posts the chosen summaries serve for SFT and as references.
    """
    train, test, dropped = split_pairs(config, partial(_read_comparisons, config))
    files = preference_files(config, train, test)
    train_posts, test_posts = _split_posts(config)
    if train_posts:
        files["sft.jsonl"] = [
            {"prompt_id": post["prompt_id"], "prompt": post["prompt"], "completion": post["reference"]}
            for post in train_posts
        ]
        files["prompts.train.jsonl"] = [
            {"prompt_id": post["prompt_id"], "prompt": post["prompt"]} for post in train_posts[: config.train_prompts]
        ]
        files["prompts.test.jsonl"] = test_posts[: config.test_prompts]
    return Prepared(files, dropped, metrics=dropped)


def plan(config: Prepare) -> dict[str, Any]:
    """What --dry-run shows."""
    return {
        "train prompts": config.train_prompts,
        "test prompts": config.test_prompts,
        "source": config.source or f"{COMPARISONS_HUB_ID}, {POSTS_HUB_ID}",
    }


def prompt_of(post: str) -> str:
    """The post, followed by the cue for a summary."""
    post = post.rstrip()
    return post if post.endswith(CUE) else f"{post}\n{CUE}"


def summary(text: str) -> str:
    """The summary as a completion of `prompt_of`: one space, then the text without a cue of its own."""
    return " " + text.strip().removeprefix(CUE).strip()


def comparisons(rows: Iterable[tuple[int, dict]], prefix: str, place: str) -> tuple[list[dict], dict[str, int]]:
    """(preference rows, rows dropped by reason) from rows with `prompt`, `chosen` and `rejected`.

    A prompt_id is `prefix` and the row's line. Raises InputError naming `place` and line for a missing column.
    """
    kept, dropped = [], {"equal": 0, "empty": 0}
    for line, row in rows:
        prompt, chosen, rejected = (text_of(row, name, f"{place}:{line}") for name in ("prompt", "chosen", "rejected"))
        sides = {"chosen": summary(chosen), "rejected": summary(rejected)}
        if not prompt.strip() or not all(side.strip() for side in sides.values()):
            dropped["empty"] += 1
        elif sides["chosen"] == sides["rejected"]:
            dropped["equal"] += 1
        else:
            kept.append({"prompt_id": f"{prefix}{line}", "prompt": prompt_of(prompt)} | sides)
    return kept, dropped


def posts(rows: Iterable[tuple[int, dict]], prefix: str, place: str) -> list[dict]:
    """Prompt rows with the human summary as `reference`, from rows with `prompt` and `label`."""
    return [
        {
            "prompt_id": f"{prefix}{line}",
            "prompt": prompt_of(text_of(row, "prompt", f"{place}:{line}")),
            "reference": summary(text_of(row, "label", f"{place}:{line}")),
        }
        for line, row in rows
    ]


def _read_comparisons(config: Prepare, split: str) -> tuple[list[dict], dict[str, int]]:
    rows = source_rows(config.source, COMPARISONS_HUB_ID, split=split, revision=config.revision)
    compared = (pair for pair in rows if config.source is None or "chosen" in pair[1])
    return comparisons(islice(compared, config.limit), f"{split}-", config.source or COMPARISONS_HUB_ID)


def _split_posts(config: Prepare) -> tuple[list[dict], list[dict]]:
    """(train posts, test posts): the hub's own splits, or a random split of the posts in --source."""
    if config.source is None:
        train, test = (
            posts(islice(source_rows(None, POSTS_HUB_ID, split=split), config.limit), f"{split}-", POSTS_HUB_ID)
            for split in ("train", "test")
        )
        return train, test
    labelled = (pair for pair in source_rows(config.source, POSTS_HUB_ID) if "label" in pair[1])
    found = posts(islice(labelled, config.limit), "", config.source)
    random.Random(f"posts {config.seed}").shuffle(found)
    cut = min(config.test_prompts, len(found) // 2)
    return found[cut:], found[:cut]
