"""The fake device, and models to run on it."""

import json
from pathlib import Path

import pytest

from fake_gpu import device
from fake_gpu.client import Machine
from helpers.chain import World
from helpers.tiny_models import tiny_model

MODELS = ("llama", "neox", "gemma3")


@pytest.fixture(scope="session")
def card(tmp_path_factory):
    """The process with the fake device; skips where it cannot be built."""
    if reason := device.missing():
        pytest.skip(reason)
    machine = Machine(tmp_path_factory.mktemp("fake-gpu"))
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def inputs(world) -> World:
    """The miniature world with preferences of two reviews' rests, a reward model without training, other families."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = world.folder
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    texts = [row["text"].split(" ") for row in world.rows("sft.jsonl")]
    pairs = [
        {"prompt": " ".join(one[:3]), "chosen": " " + " ".join(one[3:]), "rejected": " " + " ".join(other[3:])}
        for one, other in zip(texts[:48], texts[48:], strict=True)
    ]
    pairs = [row | {"weight": 1 + i % 3} for i, row in enumerate(pairs)]
    rated = [row | {"completion": row.pop("chosen"), "label": i % 2} for i, row in enumerate(map(dict, pairs))]
    for name, rows in (("pairs", pairs), ("rated", rated)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for kind in MODELS:
        model = tiny_model(kind, vocab=len(tokenizer), context=160, width=64, std=0.1, **ids)
        _save(model, tokenizer, folder / f"fake-{kind}")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "lm", num_labels=1)
    _save(reward, tokenizer, folder / "fake-rm")
    return world


def _save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
