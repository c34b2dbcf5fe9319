"""The miniature world that the tests of the chain share: made once, then only added to."""

import json

import pytest
from chain import TRAIN, World, dpo

from dpoctl.data import imdb, toy


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    from dpoctl.data import toy_models
    from dpoctl.models.load import load_tokenizer

    folder = tmp_path_factory.mktemp("world")
    reviews = [{"id": f"r{i}"} | r for i, r in enumerate(toy.reviews(400, 0))]
    toy_models.build_base_lm([r["text"] for r in reviews], folder / "lm", 0, steps=40, batch=16)
    toy_models.build_classifier(reviews, folder / "classifier", 0, steps=20, batch=16)
    prompts = imdb.prefix_prompts(reviews, load_tokenizer(str(folder / "lm")), 0)
    sft, train, test = imdb.split_prompts(reviews, prompts, 24, 12, 0)
    for name, rows in (("sft", sft[:96]), ("held", sft[96:120]), ("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return World(folder)


@pytest.fixture(scope="session")
def prefs(world) -> World:
    world.run(
        "sft",
        "--model",
        "lm",
        "--data",
        "sft.jsonl",
        "--eval-data",
        "held.jsonl",
        "--lr",
        "1e-3",
        *TRAIN,
        "--out",
        "sft",
    )
    world.run("make-prefs", "--model", "sft", "--prompts", "train.jsonl", "--scorer", "classifier", "--max-new-tokens", "20",
              "--wave-rows", "16", "--completions-out", "samples.jsonl", "--out", "prefs.jsonl")  # fmt: skip
    return world


@pytest.fixture(scope="session")
def trained(prefs) -> World:
    prefs.run(*dpo("dpo"))
    return prefs
