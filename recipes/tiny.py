"""Generate what `make smoke` runs on, offline: a task's rows with the columns of its Hub data set, and tiny models."""

import json
import random
import sys
from pathlib import Path

from dpoctl.tasks import toy_models, toy_text

TASK, OUT = sys.argv[1], Path(sys.argv[2])
PROMPTS = 24


def hh(reviews: list[str], draw: random.Random) -> list[dict]:
    """Complete dialogues, `chosen` and `rejected`; every third has earlier turns, some more than the context holds."""
    rows = []
    for i in range(PROMPTS):
        turns = {0: 1, 3: 60}.get(i % 6, 0)
        before = "".join(f"\n\nHuman: What is it about?\n\nAssistant: {draw.choice(reviews)}" for _ in range(turns))
        prompt = f"{before}\n\nHuman: Film {i}: is it good?\n\nAssistant:"
        rows.append({side: f"{prompt} {draw.choice(reviews)}" for side in ("chosen", "rejected")})
    return rows


def tldr(reviews: list[str], draw: random.Random) -> list[dict]:
    """Comparisons (`prompt`, `chosen`, `rejected`), then posts with a human summary (`prompt`, `label`)."""
    posts = [f"SUBREDDIT: r/films\n\nPOST: {i} {draw.choice(reviews)}\n\nTL;DR:" for i in range(2 * PROMPTS)]
    compared = [
        {"prompt": p} | {side: draw.choice(reviews) for side in ("chosen", "rejected")} for p in posts[:PROMPTS]
    ]
    return compared + [{"prompt": p, "label": draw.choice(reviews)} for p in posts[PROMPTS:]]


def cnn_dm(reviews: list[str], draw: random.Random) -> list[dict]:
    return [
        {"id": f"a{i}", "article": f"(CNN) {draw.choice(reviews)}", "highlights": draw.choice(reviews)}
        for i in range(PROMPTS)
    ]


reviews = toy_text.reviews(200, seed=0)
texts = [" ".join(review["text"].split()[:8]) for review in reviews]  # the model's context has 160 tokens
rows = {"hh": hh, "tldr": tldr, "cnn-dm": cnn_dm}[TASK](texts, random.Random(0))
OUT.mkdir(parents=True, exist_ok=True)
(OUT / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
for seed, name in enumerate(
    ("dpo", "ppo") if TASK == "cnn-dm" else ("lm",)
):  # cnn-dm takes policies that others trained
    toy_models.build_base_lm(texts, OUT / name, seed, steps=20, batch=8)
toy_models.build_classifier(reviews, OUT / "classifier", 0, steps=5, batch=8)  # the judge
