"""Reviews from files, cleaned, and prompts that are their first tokens."""

import csv
import gzip
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpoctl.errors import InputError
from dpoctl.tasks import imdb, toy_text

REVIEWS = [{"id": f"r{i}"} | r for i, r in enumerate(toy_text.reviews(300, 5))]


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((r["text"] for r in REVIEWS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>")


def test_markup_goes():
    assert imdb.clean("Good.<br /><br />It&#39;s  <i>fun</i> &amp; short\n") == "Good. It's fun & short"
    assert imdb.clean("5 < 6 and 7 > 3") == "5 < 6 and 7 > 3"


def test_every_kind_of_file_gives_the_same_reviews(tmp_path):
    import datasets

    rows = [{"text": f"a <br /> review, no {i}", "label": i % 2} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "r.jsonl").write_text(lines)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with open(tmp_path / "r.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "r.parquet"))
    found = [
        [(r["text"], r["label"]) for r in imdb.load_reviews(str(tmp_path / name))]
        for name in ("r.jsonl", "z.jsonl.gz", "r.csv", "r.parquet")
    ]
    assert found[0] == [(f"a review, no {i}", i % 2) for i in range(5)]
    assert all(f == found[0] for f in found)


def test_prefixes_have_two_to_eight_tokens_and_depend_on_seed_and_id_alone(tokenizer):
    prompts = imdb.prefix_prompts(REVIEWS, tokenizer, 0)
    lengths = [len(p["prompt_ids"]) for p in prompts]
    assert set(lengths) == set(range(2, 9))
    assert all(r["text"].startswith(p["prompt"]) for r, p in zip(REVIEWS, prompts, strict=True))
    assert imdb.prefix_prompts(REVIEWS[7:8], tokenizer, 0) == prompts[7:8]
    assert imdb.prefix_prompts(REVIEWS, tokenizer, 1) != prompts


def test_a_prefix_never_ends_within_a_character(tokenizer):
    """Umlauts and an emoji are several byte tokens each to this tokenizer."""
    texts = [{"id": str(i), "text": "Störtebeker 😀😀 is ünter"} for i in range(60)]
    for prompt in imdb.prefix_prompts(texts, tokenizer, 0):
        assert "\ufffd" not in prompt["prompt"] and texts[0]["text"].startswith(prompt["prompt"])
    with pytest.raises(InputError, match="no prefix of"):
        imdb.prefix_prompts([{"id": "x", "text": "😀"}], tokenizer, 0, 2, 3)  # four tokens, whole only together


def test_test_prompts_come_from_other_reviews_and_are_no_train_prompts(tokenizer):
    prompts = imdb.prefix_prompts(REVIEWS, tokenizer, 0)
    sft, train, test = imdb.split_prompts(REVIEWS, prompts, 100, 40, 0)
    assert (len(train), len(test), len(sft)) == (100, 40, 260)
    assert not {p["prompt_id"] for p in test} & {r["id"] for r in sft}
    assert not {p["prompt"] for p in test} & {p["prompt"] for p in train}
    with pytest.raises(InputError, match="unseen test prompts"):
        imdb.split_prompts(REVIEWS, prompts, 290, 40, 0)


@pytest.mark.parametrize(
    ("text", "said"), [('{"review": "x"}\n', ":1: text"), ('{"text": "ok"}\n{"text": " <br /> "}\n', ":2: text")]
)
def test_bad_rows_are_named(tmp_path, text, said):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        imdb.load_reviews(str(tmp_path / "bad.jsonl"))


def test_toy_reviews_are_seeded_balanced_and_various():
    rows = toy_text.reviews(2000, 0)
    assert rows[:50] == toy_text.reviews(50, 0) and rows != toy_text.reviews(2000, 1)
    assert 0.45 < sum(r["label"] == "POSITIVE" for r in rows) / len(rows) < 0.55  # six standard deviations are 0.067
    assert len({r["text"] for r in rows}) > 1990
    openings = {
        label: {" ".join(r["text"].split()[:3]) for r in rows if r["label"] == label}
        for label in ("POSITIVE", "NEGATIVE")
    }
    shared = openings["POSITIVE"] & openings["NEGATIVE"]
    assert len(shared) > 100  # a beginning leaves the outcome open
