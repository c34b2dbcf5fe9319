"""make-prefs --unpaired: labels by scores, a judge and votes; shards, resuming, training on the rows, their preview."""

import json

import pytest

from dpoctl.inference.labels import ranked
from helpers import samples_to_pair
from helpers.chat_families import save_family
from helpers.judge_server import JudgeServer
from helpers.judging import fenced, rows_of, write
from helpers.samples_to_pair import SCORER, caller, enter, samples

TEXTS = samples_to_pair.TEXTS | {"p3": ["alone here"]}
RANKED = [("a", False), ("a b c", True), ("x y", True), ("x", False), ("z w", True)]
SAMPLES = "--samples s.jsonl --scorer python:words.py:words"


@pytest.fixture
def here(tmp_path, monkeypatch):
    return enter(tmp_path, monkeypatch, TEXTS)


@pytest.fixture
def run(here, capsys):
    return caller(capsys)


def labels(path) -> list[tuple[str, bool]]:
    return [(row["completion"], row["label"]) for row in rows_of(path)]


def metrics(path) -> dict:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())["metrics"]


# --- labels ----------------------------------------------------------------------------------------------------------


def test_a_label_is_the_rank_within_the_prompt(here, run):
    """The middle of three, equal answers and a sample alone have no label."""
    said = run(f"make-prefs {SAMPLES} --unpaired --out u.jsonl --completions-out scored.jsonl")
    assert labels(here / "u.jsonl") == RANKED
    assert rows_of(here / "u.jsonl")[0] == samples(TEXTS)[0] | {"score": 1.0, "label": False}
    made = metrics(here / "u.jsonl")
    assert (made["desirable"], made["undesirable"], made["ties"]) == (3, 2, 4) and "pairs" not in made
    assert made["desirable"] + made["undesirable"] + made["ties"] == made["samples"] == 9
    assert "3 desirable and 2 undesirable completions from 9 samples of 4 prompts" in said
    assert "4 samples in the middle of their prompt" in said
    assert len(rows_of(here / "scored.jsonl")) == 9 and "label" not in rows_of(here / "scored.jsonl")[0]


def test_a_threshold_labels_every_sample(here, run):
    """Scores of the rows themselves serve too, and a prompt with one sample."""
    run(f"make-prefs {SAMPLES} --unpaired --threshold 2 --out u.jsonl")
    texts = [text for found in TEXTS.values() for text in found]
    assert labels(here / "u.jsonl") == [(text, len(text.split()) >= 2) for text in texts]
    run("make-prefs --samples u.jsonl --unpaired --threshold 3 --out again.jsonl")
    assert labels(here / "again.jsonl") == [(text, text == "a b c") for text in texts]
    made = metrics(here / "again.jsonl")
    assert (made["desirable"], made["undesirable"]) == (1, 8) and "ties" not in made and "duplicates" not in made
    assert made["score_type"] == "given"


def test_one_label_is_told(here, run):
    assert "every completion has one label" in run(f"make-prefs {SAMPLES} --unpaired --threshold 9 --out u.jsonl")


def test_the_middle_is_found_whatever_the_rounding_of_shares():
    rows, counts = [{"n": n} for n in range(3)], {"desirable": 0, "undesirable": 0, "ties": 0}
    thirds = {(0, 1): 2 / 3, (1, 2): 2 / 3, (0, 2): 1 / 3}  # a circle: each beats one and loses to one
    assert ranked(rows, thirds, counts) == [] and counts["ties"] == 3


def test_a_judge_labels_by_wins(here, run):
    def longer(text: str) -> str:
        _, a, b = map(len, fenced(text))
        return f"Preferred: {'A' if a >= b else 'B'}"

    with JudgeServer(longer) as server:
        run(
            "make-prefs --samples s.jsonl --judge openai --judge-model m --unpaired --out u.jsonl "
            f"--judge-base-url {server.url}"
        )
    assert labels(here / "u.jsonl") == RANKED
    rows = {row["completion"]: (row["win_rate"], row["comparisons"]) for row in rows_of(here / "u.jsonl")}
    assert rows == {"a": (0.0, 2), "a b c": (1.0, 2), "x y": (0.75, 2), "x": (0.0, 2), "z w": (0.75, 2)}
    made = metrics(here / "u.jsonl")
    assert (made["desirable"], made["undesirable"], made["ties"], made["invalid"]) == (3, 2, 1, 3)


def test_votes_label_and_carry_the_ids_of_the_samples(here, run):
    ballots = [
        {"prompt_id": "p0", "prompt": "Say p0", "k": 0, "a": "a", "b": other, "verdict": verdict, "judge": who}
        for other, verdict, who in (("a b", "b", "x"), ("a b", "b", "y"), ("a b c", "a", "x"), ("a b c", "b", "y"))
    ]
    write(here / "j.jsonl", ballots)
    run("make-prefs --judgements j.jsonl --samples s.jsonl --unpaired --out u.jsonl")
    rows = rows_of(here / "u.jsonl")
    assert labels(here / "u.jsonl") == [("a", False), ("a b", True)]  # a b c won one vote of two
    assert [(row["win_rate"], row["comparisons"], row["k"]) for row in rows] == [(0.25, 2, 0), (1.0, 1, 1)]
    run("make-prefs --judgements j.jsonl --unpaired --out texts.jsonl")
    assert labels(here / "texts.jsonl") == labels(here / "u.jsonl")
    said = run("make-prefs --judgements j.jsonl --unpaired --out p.jsonl --dry-run")
    assert "compared pairs 2 rows at most 3" in said


# --- options, shards, resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (f"{SAMPLES} --unpaired --pairs random", "--pairs has no effect with --unpaired"),
        (f"{SAMPLES} --unpaired --min-margin 1", "--min-margin has no effect with --unpaired"),
        (f"{SAMPLES} --threshold 1", "--threshold has no effect without --unpaired"),
        ("--judgements s.jsonl --unpaired --threshold 1", "--threshold has no effect with --judgements"),
        ("--samples one.jsonl --unpaired --scorer python:words.py:words", "no prompt has two samples"),
        ("--samples s.jsonl --unpaired --threshold 1", "s.jsonl:1: field 'score': missing"),
    ],
)
def test_what_cannot_be_labelled_is_refused(here, run, args, said):
    write(here / "one.jsonl", samples({"p": ["a"], "q": ["b"]}))
    assert said in run(f"make-prefs {args} --out u.jsonl", code=2)
    assert not list(here.glob("u.jsonl*"))


def test_a_plan_says_how_many_rows(here, run):
    said = run(f"make-prefs {SAMPLES} --unpaired --out u.jsonl --dry-run")
    assert "samples 9 rows at most 9" in said and "pairs" not in said


@pytest.mark.parametrize("more", ["", "--threshold 2"])
def test_shards_merge_to_the_bytes_of_one_run(here, run, more):
    write(here / "s.jsonl", samples({f"p{i}": [str(i), f"{i} b", "c d e"][: 2 + i % 2] for i in range(9)}))
    made = f"make-prefs {SAMPLES} --unpaired {more}"
    run(f"{made} --out whole.jsonl")
    for number in (1, 2, 3):
        run(f"{made} --out {number}.jsonl --shard {number}/3")
    said = run("merge 1.jsonl 2.jsonl 3.jsonl --out joined.jsonl")
    assert (here / "joined.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()
    assert metrics(here / "joined.jsonl") == metrics(here / "whole.jsonl")
    assert "desirable and" in said
    assert "complete already" in run(f"{made} --out joined.jsonl")


def test_a_run_that_is_cut_short_resumes_with_the_same_bytes(here, run):
    """The scorer fails at the second batch, the first time."""
    (here / "words.py").write_text(
        "import os\n"
        + SCORER.replace("    return", "    assert len(rows) > 5 or not os.path.exists('fail')\n    return")
    )
    write(here / "s.jsonl", samples(TEXTS | {"p4": ["q", "r s"]}))
    run(f"make-prefs {SAMPLES} --unpaired --out whole.jsonl")
    (here / "fail").touch()
    run(f"make-prefs {SAMPLES} --unpaired --out cut.jsonl", code=2)
    (here / "fail").unlink()
    assert "resuming after" in run(f"make-prefs {SAMPLES} --unpaired --out cut.jsonl")
    assert (here / "cut.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


# --- what reads the rows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return str(save_family("mistral", folder / "m"))


@pytest.mark.parametrize("loss", ["kto --unpaired", "bco", "apo_zero_unpaired"])
def test_training_reads_the_rows(here, run, model, loss):
    run(f"make-prefs {SAMPLES} --unpaired --out u.jsonl")
    said = run(
        f"train-dpo --model {model} --data u.jsonl --loss {loss} --max-steps 1 --batch-size 4 --device cpu "
        "--warmup-steps 0 --out run"
    )
    assert "u.jsonl: 3 desirable and 2 undesirable completions of 2 prompts" in said


def test_a_preview_shows_labels_and_trained_tokens(here, run, model):
    run(f"make-prefs {SAMPLES} --unpaired --out u.jsonl")
    found = json.loads(run(f"preview u.jsonl --model {model} --json --rows 2"))
    assert found["for"] == "train-dpo" and found["shapes"] == {"prompt, completion as text": 5}
    assert [sequence["name"] for row in found["shown"] for sequence in row["sequences"]] == ["undesirable", "desirable"]
    tokens = {kind: of["tokens"] for kind, of in found["labels"].items()}
    shown = [json.loads(run(f"preview u.jsonl --model {model} --json --row {n}"))["shown"][0] for n in range(1, 6)]
    every = [sequence for row in shown for sequence in row["sequences"]]
    assert tokens == {k: sum(s["trained"] for s in every if s["name"] == k) for k in ("desirable", "undesirable")}
    assert {kind: of["completions"] for kind, of in found["labels"].items()} == {"desirable": 3, "undesirable": 2}
    assert "label" in found["columns"]["used"] and "score" in found["columns"]["ignored"]
    assert "3 desirable (" in run(f"preview u.jsonl --model {model}")


def test_a_preview_reads_scores_against_a_threshold_and_tells_what_training_refuses(here, run, model):
    run(f"make-prefs {SAMPLES} --out p.jsonl --completions-out scored.jsonl")
    assert json.loads(run(f"preview scored.jsonl --model {model} --json"))["for"] == "sft"
    found = json.loads(run(f"preview scored.jsonl --model {model} --json --threshold 2"))
    assert found["for"] == "train-dpo" and found["labels"]["desirable"]["completions"] == 5
    assert "score" in found["columns"]["used"]
    assert "every completion is undesirable" in run(f"preview scored.jsonl --model {model} --threshold 9", code=2)
    assert "--threshold has no effect" in run(f"preview scored.jsonl --model {model} --for sft --threshold 9", code=2)
    write(here / "odd.jsonl", [{"prompt": "P", "completion": "a", "label": v} for v in (True, "yes", False)])
    assert "odd.jsonl:2: field 'label'" in run(f"preview odd.jsonl --model {model} --for train-dpo", code=2)
