"""Rows and prompts of a task: IMDb's reviews, or the toy world with models of its own."""

import json
from pathlib import Path

from .. import log
from ..artifacts import Work, write_atomic
from ..config import Prepare
from ..data import imdb, toy

_TOY_PRETRAINING, _TOY_SFT = 12000, 4000  # reviews; every part of the toy world has a seed range of its own


def run(config: Prepare, work: Work) -> None:
    {"imdb": _imdb, "toy": _toy}[config.task](config, work, Path(config.out))


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
