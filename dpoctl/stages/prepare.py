"""Rows and prompts of a task: IMDb's reviews, dialogues, summaries, or the toy world with models of its own."""

import itertools
import json
import random
from pathlib import Path

from .. import log
from ..artifacts import Work, write_atomic
from ..config import Prepare
from ..data import dialogues, imdb, summaries, toy
from ..data.sources import source_rows
from ..errors import InputError

_TOY_PRETRAINING, _TOY_SFT = 12000, 3000  # reviews; every part of the toy world has a seed range of its own


def run(config: Prepare, work: Work) -> None:
    tasks = {"imdb": _imdb, "toy": _toy, "hh": _hh, "tldr": _tldr, "cnn-dm": _cnn_dm}
    tasks[config.task](config, work, Path(config.out))


def _hh(config: Prepare, work: Work, out: Path) -> None:
    """Preferences, the chosen answers as SFT rows (Preferred-FT), prompts with the chosen answer as reference."""
    counts: dict[str, int] = {}

    def read(split: str) -> list[dict]:
        rows = source_rows(config.source, dialogues.HUB_ID, split=split, revision=config.revision)
        wanted = itertools.islice(rows, config.limit)
        found, left_out = dialogues.preferences(wanted, f"{split}-", config.source or dialogues.HUB_ID)
        for name, n in left_out.items():
            counts[name] = counts.get(name, 0) + n
        return found

    train, test = _split_pairs(config, read)
    log.say(f"left out: {', '.join(f'{n} {name}' for name, n in counts.items())}")
    _write_rows(work, out, _preference_files(config, train, test), counts)


def _tldr(config: Prepare, work: Work, out: Path) -> None:
    """Comparisons, and the posts with their human summaries: SFT rows, and prompts with a reference.

    A file holds either or both: rows with `chosen` and `rejected` are comparisons, rows with `label` are posts.
    """
    counts: dict[str, int] = {}
    place = config.source or summaries.COMPARISONS

    def read(split: str) -> list[dict]:
        rows = source_rows(config.source, summaries.COMPARISONS, split=split, revision=config.revision)
        wanted = (pair for pair in rows if config.source is None or "chosen" in pair[1])
        found, left_out = summaries.comparisons(itertools.islice(wanted, config.limit), f"{split}-", place)
        for name, n in left_out.items():
            counts[name] = counts.get(name, 0) + n
        return found

    train, test = _split_pairs(config, read)
    files = _preference_files(config, train, test)
    if config.source is None:
        splits = [
            summaries.posts(
                itertools.islice(source_rows(None, summaries.TLDR, split=split), config.limit),
                f"{split}-",
                summaries.TLDR,
            )
            for split in ("train", "test")
        ]
    else:
        rows = source_rows(config.source, summaries.TLDR)
        labelled = summaries.posts(itertools.islice((r for r in rows if "label" in r[1]), config.limit), "", place)
        random.Random(f"posts {config.seed}").shuffle(labelled)
        cut = min(config.test_prompts, len(labelled) // 2)
        splits = [labelled[cut:], labelled[:cut]]
    if splits[0]:
        asked = [{k: row[k] for k in ("prompt_id", "prompt")} for row in splits[0][: config.train_prompts]]
        files["sft.jsonl"] = [
            {"prompt_id": r["prompt_id"], "prompt": r["prompt"], "completion": r["reference"]} for r in splits[0]
        ]
        files["prompts.train.jsonl"] = asked
        files["prompts.test.jsonl"] = splits[1][: config.test_prompts]
    log.say(f"left out: {', '.join(f'{n} {name}' for name, n in counts.items())}")
    _write_rows(work, out, files, counts)


def _cnn_dm(config: Prepare, work: Work, out: Path) -> None:
    rows = source_rows(config.source, summaries.CNN_DM, name="3.0.0", split="test", revision=config.revision)
    limit = min(n for n in (config.limit, config.test_prompts) if n is not None)
    files = {"prompts.test.jsonl": summaries.articles(rows, config.source or summaries.CNN_DM, limit)}
    _write_rows(work, out, files, {})


def _split_pairs(config: Prepare, read) -> tuple[list[dict], list[dict]]:
    """(train, test) preference rows: the hub's own splits, or a file's rows split by prompt."""
    if config.source is None:
        return read("train"), read("test")
    rows = read("row")
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise InputError(f"{config.source}: {len(rows)} usable preferences over {len(prompts)} prompts, 2 are needed")
    random.Random(f"split {config.seed}").shuffle(prompts)
    held_out = set(prompts[: min(config.test_prompts, len(prompts) // 2)])
    return [r for r in rows if r["prompt"] not in held_out], [r for r in rows if r["prompt"] in held_out]


def _preference_files(config: Prepare, train: list[dict], test: list[dict]) -> dict[str, list[dict]]:
    """The preferences, the chosen answers as SFT rows, and their prompts; each test prompt once, with its reference."""

    def first(rows: list[dict]) -> list[dict]:
        return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]

    return {
        "prefs.train.jsonl": train,
        "prefs.test.jsonl": test,
        "sft.jsonl": [{"prompt_id": r["prompt_id"], "prompt": r["prompt"], "completion": r["chosen"]} for r in train],
        "prompts.train.jsonl": [
            {k: r[k] for k in ("prompt_id", "prompt")} for r in first(train)[: config.train_prompts]
        ],
        "prompts.test.jsonl": [
            {"prompt_id": r["prompt_id"], "prompt": r["prompt"], "reference": r["chosen"]}
            for r in first(test)[: config.test_prompts]
        ],
    }


def _write_rows(work: Work, out: Path, files: dict[str, list[dict]], figures: dict) -> None:
    for name, rows in files.items():
        write_atomic(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        log.say(f"{out / name}: {len(rows)} rows")
    work.finish([(out / name, len(rows)) for name, rows in files.items()], figures, {})


def _imdb(config: Prepare, work: Work, out: Path) -> None:
    from ..models.load import load_tokenizer

    reviews = imdb.load_reviews(config.source, config.limit, config.revision)
    log.say(f"{config.source or imdb.HUB_ID}: {len(reviews)} reviews")
    tokenizer = load_tokenizer(config.tokenizer)
    _write(config, work, out, tokenizer, reviews, {}, {})


def _toy(config: Prepare, work: Work, out: Path) -> None:
    from ..data import toy_models
    from ..models.load import load_tokenizer
    from ..training import runtime, setup

    device, _ = setup.open_device(config)
    seed = 10 * config.seed
    loss = toy_models.build_base_lm(
        [r["text"] for r in toy.reviews(_TOY_PRETRAINING, seed)], out / "base-lm", config.seed
    )
    log.say(f"base language model: {loss:.3f} nats per token at the end of pre-training")
    accuracy = toy_models.build_classifier(toy.reviews(_TOY_PRETRAINING, seed + 1), out / "classifier", config.seed)
    log.say(f"sentiment classifier: {accuracy:.1%} right on held-out reviews")
    size = (config.limit or _TOY_SFT) + 4 * config.test_prompts  # many short beginnings recur, so invent some more
    reviews = [{"id": f"toy-{i}"} | r for i, r in enumerate(toy.reviews(size, seed + 2))]
    figures = {"pretraining_loss": loss, "classifier_accuracy": accuracy}
    cost = {"peak_memory_bytes": runtime.peak_memory_bytes(device), "device": runtime.device_name(device)}
    _write(config, work, out, load_tokenizer(str(out / "base-lm")), reviews, figures, cost)


def _write(config: Prepare, work: Work, out: Path, tokenizer, reviews: list[dict], figures: dict, cost: dict) -> None:
    """Write the row files and the manifest; train and test prompts come from different reviews."""
    prompts = imdb.prefix_prompts(reviews, tokenizer, config.seed, config.min_prefix, config.max_prefix)
    sft, train, test = imdb.split_prompts(reviews, prompts, config.train_prompts, config.test_prompts, config.seed)
    files = {"sft.jsonl": sft, "prompts.train.jsonl": train, "prompts.test.jsonl": test}
    for name, rows in files.items():
        write_atomic(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        log.say(f"{out / name}: {len(rows)} rows")
    folders = [out / name for name in ("base-lm", "classifier") if (out / name).is_dir()]
    made = [(p, None) for folder in folders for p in sorted(folder.iterdir())]
    work.finish([*made, *((out / name, len(rows)) for name, rows in files.items())], figures, cost)


def plan(config: Prepare) -> dict:
    shown = {"task": config.task, "train prompts": config.train_prompts, "test prompts": config.test_prompts}
    if config.task == "toy":
        return shown | {"pre-training reviews": _TOY_PRETRAINING, "SFT reviews": config.limit or _TOY_SFT}
    return shown | {"source": config.source or imdb.HUB_ID, "tokenizer": config.tokenizer}
