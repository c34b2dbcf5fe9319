"""`prepare hh | tldr | cnn-dm --source FILE` as a user runs them: every format gives the same rows, nothing is in two
splits."""

import gzip
import json
import subprocess
import sys

import pytest

from dpoctl.errors import InputError
from dpoctl.tasks import hh, tldr
from helpers.chain import ROOT


def prepare(folder, task: str, source: str, *more: str, code: int = 0):
    out = source.replace(".", "_")
    command = [sys.executable, "-m", "dpoctl", "prepare", task, "--source", source, "--out", out, *more]
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    files = sorted((folder / out).glob("*.jsonl"))
    return {f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in files}, done.stderr


def save(folder, rows: list[dict], *formats: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for kind in formats:
        if kind == "jsonl":
            (folder / "rows.jsonl").write_text(lines)
        elif kind == "jsonl.gz":
            with gzip.open(folder / "rows.jsonl.gz", "wt") as f:
                f.write(lines)
        else:
            import datasets

            datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))


def dialogue(i: int, answer: str, turns: int = 1) -> str:
    before = "".join(f"\n\nHuman: Question {i}.{t}?\n\nAssistant: Answer {t}." for t in range(turns - 1))
    return f"{before}\n\nHuman: Question {i}?\n\nAssistant: {answer}"


def test_hh_in_every_format(tmp_path):
    good = [{"chosen": dialogue(i, "Yes.", 1 + i % 3), "rejected": dialogue(i, "No.", 1 + i % 3)} for i in range(12)]
    bad = [
        {"chosen": "Human asks nothing", "rejected": dialogue(0, "No.")},  # malformed
        {"chosen": dialogue(1, "Yes."), "rejected": dialogue(2, "No.")},  # other prompts
        {"chosen": dialogue(3, "Same."), "rejected": dialogue(3, "Same.")},
        {"chosen": dialogue(4, ""), "rejected": dialogue(4, "No.")},  # no answer
    ]
    save(tmp_path, good + bad, "jsonl", "jsonl.gz", "parquet")
    found = [
        prepare(tmp_path, "hh", f"rows.{kind}", "--test-prompts", "4") for kind in ("jsonl", "jsonl.gz", "parquet")
    ]
    assert found[0][0] == found[1][0] == found[2][0]
    files, said = found[0]
    assert "2 malformed, 1 different_prompts, 1 equal" in said
    train, test = files["prefs.train.jsonl"], files["prefs.test.jsonl"]
    assert (len(train), len(test)) == (8, 4)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    for row in train + test:
        assert row["prompt"].endswith("\n\nAssistant:") and row["chosen"] == " Yes." and row["rejected"] == " No."
    assert {(r["prompt"], r["completion"]) for r in files["sft.jsonl"]} == {(r["prompt"], " Yes.") for r in train}
    assert {(r["prompt"], r["reference"]) for r in files["prompts.test.jsonl"]} == {
        (r["prompt"], " Yes.") for r in test
    }


def test_tldr_has_comparisons_and_posts_with_human_summaries(tmp_path):
    compared = [
        {"prompt": f"POST: {i % 6}\n\nTL;DR:", "chosen": f"good {i}", "rejected": f"TL;DR: bad {i}"} for i in range(12)
    ]
    posts = [{"prompt": f"POST: p{i}", "label": f"human {i}"} for i in range(10)]
    save(tmp_path, compared + [{"prompt": "POST", "chosen": "x", "rejected": " x"}] + posts, "jsonl")
    files, said = prepare(tmp_path, "tldr", "rows.jsonl", "--test-prompts", "3")
    assert "1 equal" in said
    train, test = files["prefs.train.jsonl"], files["prefs.test.jsonl"]
    assert len(train) + len(test) == 12 and len({r["prompt"] for r in test}) == 3
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert all(r["prompt"].endswith("\nTL;DR:") and r["rejected"].startswith(" bad") for r in train + test)
    asked = files["prompts.test.jsonl"]
    assert len(asked) == 3 and all(r["reference"].startswith(" human") for r in asked)
    taught = {r["prompt"] for r in files["sft.jsonl"]}
    assert len(taught) == 7 and not taught & {r["prompt"] for r in asked}


def test_cnn_dm_keeps_ids_and_joins_the_highlights(tmp_path):
    rows = [{"id": f"x{i}", "article": f"Article {i}.", "highlights": "One .\nTwo ."} for i in range(5)]
    save(tmp_path, rows, "jsonl", "parquet")
    files, _ = prepare(tmp_path, "cnn-dm", "rows.parquet", "--test-prompts", "4")
    assert files == prepare(tmp_path, "cnn-dm", "rows.jsonl", "--test-prompts", "4")[0]
    expected = [
        {"prompt_id": f"x{i}", "prompt": f"Article {i}.\nTL;DR:", "reference": " One . Two ."} for i in range(4)
    ]
    assert files == {"prompts.test.jsonl": expected}


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("hh", {"chosen": "Human?", "rejected": "No"}, "0 usable preferences"),
        ("hh", {"chosen": "Human?"}, "rows.jsonl:1: rejected: expected a text, got no such column"),
        ("tldr", {"prompt": "x", "chosen": 3, "rejected": "b"}, "rows.jsonl:1: chosen: expected a text, got int"),
        ("cnn-dm", {"text": "x"}, "rows.jsonl:1: article: expected a text, got no such column"),
    ],
)
def test_what_is_no_such_row_is_one_message_and_nothing_is_written(tmp_path, task, row, said):
    save(tmp_path, [row], "jsonl")
    files, err = prepare(tmp_path, task, "rows.jsonl", code=2)
    assert said in err and err.count("error:") == 1 and not files


@pytest.mark.parametrize(
    ("task", "hub_ids"),
    [
        ("hh", ["Anthropic/hh-rlhf"]),
        ("tldr", ["CarperAI/openai_summarize_comparisons", "CarperAI/openai_summarize_tldr"]),
        ("cnn-dm", ["abisee/cnn_dailymail"]),
    ],
)
def test_a_dry_run_names_the_tasks_own_data_sets(tmp_path, task, hub_ids):
    command = [sys.executable, "-m", "dpoctl", "prepare", task, "--out", "out", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert shown["source"].split(", ") == hub_ids
    assert not (tmp_path / "out").exists()


def test_dialogues_split_before_the_last_answer():
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Well, so."
    assert hh.split_dialogue(text) == (
        "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:",
        " Well, so.",
    )
    for bad in (
        "",
        "no turns",
        "\n\nHuman: Hi",
        "\n\nHuman: Hi\n\nAssistant:  ",
        "\n\nAssistant: Hi",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
    ):
        assert hh.split_dialogue(bad) is None
    rows = [
        (1, {"chosen": text, "rejected": text[:-3] + "no."}),
        (2, {"chosen": text, "rejected": "broken"}),
        (3, {"chosen": text, "rejected": "\n\nHuman: other\n\nAssistant: x"}),
        (4, {"chosen": text, "rejected": text}),
    ]
    rows.append((5, {"chosen": text, "rejected": None}))
    kept, counts = hh.preferences(rows, "t-", "f")
    assert [r["prompt_id"] for r in kept] == ["t-1"] and counts == {"malformed": 2, "different_prompts": 1, "equal": 1}
    with pytest.raises(InputError, match="f:6: rejected: expected a text, got no such column"):
        hh.preferences([(6, {"chosen": text})], "t-", "f")


def test_summaries_follow_one_cue_after_one_space():
    rows = [
        (5, {"prompt": "POST: long", "chosen": "TL;DR:  short ", "rejected": "other"}),
        (6, {"prompt": "POST: long", "chosen": "same", "rejected": "TL;DR: same"}),
    ]
    kept, counts = tldr.comparisons(rows, "t-", "f")
    assert kept == [{"prompt_id": "t-5", "prompt": "POST: long\nTL;DR:", "chosen": " short", "rejected": " other"}]
    assert counts == {"equal": 1, "empty": 0}
    [post] = tldr.posts([(1, {"prompt": "x TL;DR:", "label": "y"})], "t-", "f")
    assert post == {"prompt_id": "t-1", "prompt": "x TL;DR:", "reference": " y"}
    with pytest.raises(InputError, match="f:1: label"):
        tldr.posts([(1, {"prompt": "x"})], "t-", "f")
