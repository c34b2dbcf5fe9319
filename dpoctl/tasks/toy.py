"""The toy task: generated film reviews, with a base language model and a sentiment classifier trained on them.

It takes IMDb's place where no network or GPU is available: every later command runs on it unchanged.
"""

from pathlib import Path
from typing import Any

from .. import log
from ..config.files import Prepare
from . import toy_text
from .imdb import prompt_files
from .prepared import Prepared

PRETRAINING_REVIEWS, SFT_REVIEWS = 12000, 3000


def prepare(config: Prepare) -> Prepared:
    """Train both models into --out, then invent reviews for SFT, with prompts that are their prefixes.

    Pre-training, classifier and SFT reviews come from separate seeds.
    """
    from ..models.pretrained import silence_transformers
    from ..models.tokenizers import load_tokenizer
    from ..runtime.devices import open_compute
    from . import toy_models

    silence_transformers()
    out, compute, seed = Path(config.out), open_compute(), 10 * config.seed
    pretraining = [review["text"] for review in toy_text.reviews(PRETRAINING_REVIEWS, seed)]
    loss = toy_models.build_base_lm(pretraining, out / "base-lm", config.seed)
    log.say(f"base language model: {loss:.3f} nats per token at the end of pre-training")
    labelled = toy_text.reviews(PRETRAINING_REVIEWS, seed + 1)
    accuracy = toy_models.build_classifier(labelled, out / "classifier", config.seed)
    log.say(f"sentiment classifier: {accuracy:.1%} accuracy on held-out reviews")

    count = _sft_reviews(config) + 4 * config.test_prompts  # spare ones, since many short prefixes recur
    reviews = [{"id": f"toy-{i}"} | review for i, review in enumerate(toy_text.reviews(count, seed + 2))]
    return Prepared(
        prompt_files(config, reviews, load_tokenizer(str(out / "base-lm"))),
        metrics={"pretraining_loss": loss, "classifier_accuracy": accuracy},
        cost={"peak_memory_bytes": compute.peak_memory_bytes(), "device": compute.name},
        model_files=tuple(path for name in ("base-lm", "classifier") for path in sorted((out / name).iterdir())),
    )


def plan(config: Prepare) -> dict[str, Any]:
    """What --dry-run shows."""
    return {
        "train prompts": config.train_prompts,
        "test prompts": config.test_prompts,
        "pre-training reviews": PRETRAINING_REVIEWS,
        "SFT reviews": _sft_reviews(config),
    }


def _sft_reviews(config: Prepare) -> int:
    return config.limit or SFT_REVIEWS
