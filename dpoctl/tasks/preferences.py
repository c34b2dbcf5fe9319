"""What the preference tasks share: splits without common prompts, and the files made from preferences."""

import random
from collections.abc import Callable

from ..config.files import Prepare
from ..errors import InputError

ReadSplit = Callable[[str], tuple[list[dict], dict[str, int]]]  # split name -> (preference rows, dropped by reason)


def split_pairs(config: Prepare, read: ReadSplit) -> tuple[list[dict], list[dict], dict[str, int]]:
    """(train rows, test rows, rows dropped by reason): the hub's own splits, or the rows of --source split by prompt.

    Raises InputError where a file has fewer than two prompts.
    """
    if config.source is None:
        (train, dropped), (test, more) = read("train"), read("test")
        return train, test, {reason: n + more[reason] for reason, n in dropped.items()}
    rows, dropped = read("row")
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise InputError(f"{config.source}: {len(rows)} usable preferences over {len(prompts)} prompts; 2 are needed")
    random.Random(f"split {config.seed}").shuffle(prompts)
    held_out = set(prompts[: min(config.test_prompts, len(prompts) // 2)])
    train = [row for row in rows if row["prompt"] not in held_out]
    return train, [row for row in rows if row["prompt"] in held_out], dropped


def preference_files(config: Prepare, train: list[dict], test: list[dict]) -> dict[str, list[dict]]:
    """The preferences, the chosen completions as SFT rows (Preferred-FT), and each split's unique prompts.

    A test prompt carries its first chosen completion as `reference`.
    """
    train_prompts = _first_of_each_prompt(train)[: config.train_prompts]
    test_prompts = _first_of_each_prompt(test)[: config.test_prompts]
    return {
        "prefs.train.jsonl": train,
        "prefs.test.jsonl": test,
        "sft.jsonl": [{"prompt_id": r["prompt_id"], "prompt": r["prompt"], "completion": r["chosen"]} for r in train],
        "prompts.train.jsonl": [{"prompt_id": r["prompt_id"], "prompt": r["prompt"]} for r in train_prompts],
        "prompts.test.jsonl": [
            {"prompt_id": r["prompt_id"], "prompt": r["prompt"], "reference": r["chosen"]} for r in test_prompts
        ],
    }


def _first_of_each_prompt(rows: list[dict]) -> list[dict]:
    """The first row of each prompt, in the order in which the prompts' last rows come."""
    return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]
