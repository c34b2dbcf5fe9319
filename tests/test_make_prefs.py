"""From scored samples to pairs: all, the widest, or one at random; ties, equal texts and small margins dropped, counted."""

import json
import math
import signal
import time
from types import SimpleNamespace

import pytest

from dpoctl.stages.make_prefs import _pairs
from helpers.chain import dpo


def samples(*scores: float, texts: str = "abcd") -> tuple[list[dict], list[float]]:
    rows = [
        {"prompt_id": "p", "prompt": "I", "completion": texts[k], "k": k, "finish": "stop", "score": score, "extra": 7}
        for k, score in enumerate(scores)
    ]
    return rows, [math.log(s / (1 - s)) for s in scores]


def make(kind: str, *scores: float, min_margin: float = 0.0, texts: str = "abcd", seed: int = 0):
    config = SimpleNamespace(pairs=kind, min_margin=min_margin, seed=seed)
    counts = {"duplicates": 0, "ties": 0, "below_margin": 0, "not_picked": 0}
    return _pairs(config, *samples(*scores, texts=texts), counts), counts


def order(pairs: list[dict]) -> set[str]:
    return {p["chosen"] + p["rejected"] for p in pairs}


def test_four_samples_make_six_pairs_the_higher_score_chosen():
    pairs, counts = make("all", 0.2, 0.9, 0.5, 0.1)
    assert order(pairs) == {"ba", "bc", "bd", "ca", "cd", "ad"} and not any(counts.values())
    best = next(p for p in pairs if p["chosen"] + p["rejected"] == "bd")
    assert best["margin"] == pytest.approx(0.8) and (best["chosen_k"], best["rejected_k"]) == (1, 3)
    assert best["extra"] == 7 and best["chosen_finish"] == "stop"


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


def test_killed_it_continues_to_the_same_bytes(prefs):
    args = (
        "make-prefs --model sft --prompts train.jsonl --scorer classifier --max-new-tokens 20 --generation-batch-size 4"
    ).split()
    prefs.run(*args, "--out", "uncut.jsonl", "--completions-out", "uncut-samples.jsonl")
    again = [*args, "--out", "shot.jsonl", "--completions-out", "shot-samples.jsonl"]
    process = prefs.popen(*again)
    deadline = time.monotonic() + 120
    progress = prefs.folder / "shot.jsonl.progress"
    while not progress.exists() or progress.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (prefs.folder / "shot.jsonl").exists()
    _, err = prefs.run(*again)
    assert "continues behind" in err
    for name in (".jsonl", "-samples.jsonl"):
        assert (prefs.folder / f"shot{name}").read_bytes() == (prefs.folder / f"uncut{name}").read_bytes()
    one, other = (
        json.loads((prefs.folder / f"{n}.jsonl.manifest.json").read_text())["metrics"] for n in ("shot", "uncut")
    )
    assert one == other


@pytest.mark.parametrize(
    "args",
    [
        ["sft", "--model", "lm", "--data", "sft.jsonl"],
        ["make-prefs", "--model", "sft", "--prompts", "train.jsonl", "--scorer", "classifier"],
        ["sample", "--model", "sft", "--prompts", "train.jsonl"],
        dpo("x")[:-2],
        ["evaluate", "--model", "sft", "--ref", "sft", "--prompts", "test.jsonl", "--scorer", "classifier"],
    ],
    ids=lambda args: args[0],
)
def test_a_dry_run_shows_a_plan_and_does_nothing(prefs, args):
    before = sorted(p.name for p in prefs.folder.iterdir())
    out, _ = prefs.run(
        *args, "--out", "planned.jsonl" if "train" not in args[0] and args[0] != "sft" else "planned", "--dry-run"
    )
    assert any(character.isdigit() for character in out)
    assert sorted(p.name for p in prefs.folder.iterdir()) == before
