"""From scored samples to pairs (all, best-worst, random), what is dropped and counted; resuming; plans of dry runs."""

import math
import re
from types import SimpleNamespace

import pytest

from dpoctl.inference.pairing import scored_pairs
from dpoctl.models.load import untrained
from helpers.chain import dpo, lines_in


def samples(*scores: float, texts: str = "abcd") -> tuple[list[dict], list[float]]:
    rows = [
        {"prompt_id": "p", "prompt": "I", "completion": texts[k], "k": k, "finish": "stop", "score": score, "extra": 7}
        | {"prompt_ids": [3], "completion_ids": [ord(texts[k]), 0], "tokenizer": "t", "texts": [f"I{texts[k]}"]}
        for k, score in enumerate(scores)
    ]
    return rows, [math.log(s / (1 - s)) for s in scores]


def make(kind: str, *scores: float, min_margin: float = 0.0, texts: str = "abcd", seed: int = 0):
    config = SimpleNamespace(pairs=kind, min_margin=min_margin, seed=seed)
    counts = {"duplicates": 0, "ties": 0, "below_margin": 0, "not_picked": 0}
    return scored_pairs(config, *samples(*scores, texts=texts), counts), counts


def order(pairs: list[dict]) -> set[str]:
    return {p["chosen"] + p["rejected"] for p in pairs}


def test_four_samples_make_six_pairs_the_higher_score_chosen():
    pairs, counts = make("all", 0.2, 0.9, 0.5, 0.1)
    assert order(pairs) == {"ba", "bc", "bd", "ca", "cd", "ad"} and not any(counts.values())
    best = next(p for p in pairs if p["chosen"] + p["rejected"] == "bd")
    assert best["margin"] == pytest.approx(0.8) and (best["chosen_k"], best["rejected_k"]) == (1, 3)
    assert best["extra"] == 7 and best["chosen_finish"] == "stop"
    assert (best["prompt_ids"], best["chosen_ids"], best["rejected_ids"]) == ([3], [ord("b"), 0], [ord("d"), 0])
    assert best["tokenizer"] == "t" and best["texts"] == ["Ib", "Id"] and "completion_ids" not in best


def test_ties_equal_texts_and_small_margins_are_dropped_and_counted():
    pairs, counts = make("all", 0.5, 0.5, 0.9, 0.88, min_margin=0.05, texts="abcc")
    assert counts == {"ties": 1, "duplicates": 1, "below_margin": 0, "not_picked": 0} and len(pairs) == 4
    pairs, counts = make("all", 0.5, 0.52, 0.9, 0.93, min_margin=0.05)
    assert counts["below_margin"] == 2 and order(pairs) == {"ca", "cb", "da", "db"}


def test_best_worst_and_random_keep_one_pair_a_prompt():
    assert order(make("best-worst", 0.2, 0.9, 0.5, 0.1)[0]) == {"bd"}
    drawn = [order(make("random", 0.2, 0.9, 0.5, 0.1, seed=s)[0]) for s in range(40)]
    assert all(len(d) == 1 for d in drawn) and len({next(iter(d)) for d in drawn}) > 3
    assert drawn[0] == order(make("random", 0.2, 0.9, 0.5, 0.1, seed=0)[0])
    assert make("best-worst", 0.5, 0.5, 0.5, 0.5)[0] == []


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(prefs):
    args = (
        "make-prefs --model sft --prompts train.jsonl --scorer classifier --max-new-tokens 20 --generation-batch-size 4"
    ).split()
    prefs.run(*args, "--out", "uncut.jsonl", "--completions-out", "uncut-samples.jsonl")
    again = [*args, "--out", "shot.jsonl", "--completions-out", "shot-samples.jsonl"]
    prefs.kill(*again, when=lambda: lines_in(prefs.folder / "shot.jsonl.progress") >= 3)
    assert not (prefs.folder / "shot.jsonl").exists()
    _, err = prefs.run(*again)
    assert "resuming after" in err
    for name in (".jsonl", "-samples.jsonl"):
        assert (prefs.folder / f"shot{name}").read_bytes() == (prefs.folder / f"uncut{name}").read_bytes()
    assert prefs.manifest("shot.jsonl")["metrics"] == prefs.manifest("uncut.jsonl")["metrics"]


def plan(world, *args: str) -> dict[str, str]:
    """What a dry run prints, by name; it must write nothing."""
    before = sorted(path.name for path in world.folder.iterdir())
    out, _ = world.run(*args, "--dry-run")
    assert sorted(path.name for path in world.folder.iterdir()) == before
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        # 96 rows in batches of 32
        ("sft --model lm --data sft.jsonl --out planned", {"rows": "96", "updates": "3", "devices": "1"}),
        # 24 prompts, 4 completions of at most 64 tokens each, of which 6 pairs can be made
        (
            "make-prefs --model sft --prompts train.jsonl --scorer classifier --out planned.jsonl",
            {"prompts": "24", "completions": "96", "tokens at most": "6144", "pairs at most": "144"},
        ),
        (
            "sample --model sft --prompts train.jsonl --out planned.jsonl",
            {"prompts": "24", "completions": "24", "tokens at most": "1536"},
        ),
        (
            "evaluate --model sft --ref sft --prompts test.jsonl --scorer classifier --out planned.jsonl",
            {"models": '["sft"]', "completions": "12"},
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_dry_run_prints_the_plan_and_writes_nothing(prefs, command, expected):
    assert expected.items() <= plan(prefs, command).items()


def test_the_manifest_says_what_the_scores_are(prefs):
    """Which a loss that reads the scores asks for."""
    assert prefs.manifest("prefs.jsonl")["metrics"]["score_type"] == "prob"
    line = "train-dpo --model sft --data prefs.jsonl --loss distill --dry-run --out distilled"
    assert "its scores are probabilities" in prefs.run(line, code=2)[1]
    prefs.run(f"{line} --score-type prob")


def test_a_dry_run_of_train_dpo(prefs):
    shown = plan(prefs, *dpo("planned"))
    pairs = len(prefs.rows("prefs.jsonl"))
    assert (shown["pairs"], shown["updates"]) == (str(pairs), str(math.ceil(pairs / 16)))
    parameters = sum(p.numel() for p in untrained(str(prefs.folder / "sft"), "policy").parameters())
    assert shown["parameters"] == shown["trained parameters"] == str(parameters)
    assert re.fullmatch(r"0\.[1-9]\d GB \((updates|evaluation)\)", shown["memory of a device"])
