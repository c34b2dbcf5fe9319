"""Accuracy by a column of preference rows, as RewardBench's tables have it: worked numbers, ties, shards, refusals."""

import json

import pytest

from dpoctl.cli.app import run
from dpoctl.outputs import accuracy, shard_totals
from dpoctl.reports.accuracies import table
from dpoctl.stages import score
from dpoctl.training.targets import score_type_of
from helpers.chain import REWARD_MODEL, TRAIN

# The score of a completion is its number of words. chat: right, right, wrong, tie; code: right, tie.
BENCH = [
    ("chat", "a b c", "a"),
    ("chat", "a b", "b"),
    ("code", "x y", "y"),
    ("chat", "a", "a b"),
    ("code", "x", "z"),
    ("chat", "a b", "b a"),
]
FUNCTION = "def words(rows):\n    return [float(len(r['completion'].split())) for r in rows]\n"
COMMAND = "score --data bench.jsonl --scorer python:words.py:words"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A folder with rows in the columns of RewardBench, and a scorer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {"id": i, "prompt": f"Q{i}?", "chosen": w, "rejected": x, "chosen_model": "m", "subset": subset}
        for i, (subset, w, x) in enumerate(BENCH)
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.py").write_text(FUNCTION)
    return tmp_path


def command(line, code=0):
    assert run(line.split()) == code


def manifest(path):
    return json.loads((path.parent / f"{path.name}.manifest.json").read_text())["metrics"]


CHAT = {"accuracy": 2.5 / 4, "pairs": 4, "ties": 1}
CODE = {"accuracy": 1.5 / 2, "pairs": 2, "ties": 1}


def test_a_small_reward_bench_by_hand(bench, capsys):
    command(f"{COMMAND} --by subset --out scored.jsonl")
    out, err = capsys.readouterr()
    found = manifest(bench / "scored.jsonl")
    assert found["accuracy_by"] == {"chat": CHAT, "code": CODE}
    assert (found["accuracy"], found["pairs"], found["ties"]) == (4 / 6, 6, 2)
    assert found["mean_accuracy_by"] == pytest.approx((0.625 + 0.75) / 2)
    assert found["mean_chosen_score"] == pytest.approx(11 / 6) and found["mean_rejected_score"] == pytest.approx(8 / 6)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert lines == [
        ["chat", "0.625", "0.219–0.908", "4", "1"],
        ["code", "0.750", "0.198–0.973", "2", "1"],
        ["mean of 2 groups", "0.688", "", "", ""],
        ["all pairs", "0.667", "0.300–0.903", "6", "2"],
    ]
    assert "ties count half" in out
    assert "scored.jsonl: accuracy 0.667 on 6 pairs, 2 ties counted half (python)" in " ".join(err.split())
    rows = [json.loads(line) for line in (bench / "scored.jsonl").read_text().splitlines()]
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows][:2] == [(3.0, 1.0), (2.0, 1.0)]
    assert rows[0]["chosen_model"] == "m" and rows[0]["id"] == 0


def test_without_a_column_there_is_one_accuracy(bench, capsys):
    command(f"{COMMAND} --out scored.jsonl")
    found = manifest(bench / "scored.jsonl")
    assert (found["accuracy"], found["pairs"], found["ties"]) == (4 / 6, 6, 2) and "accuracy_by" not in found
    assert capsys.readouterr().out == ""


def test_batches_and_shards_give_the_same_table(bench, capsys, monkeypatch):
    command(f"{COMMAND} --by subset --out whole.jsonl")
    whole = capsys.readouterr().out
    monkeypatch.setattr(score, "_BATCH", 2)
    for i in (1, 2, 3, 4):  # the last has no rows
        command(f"{COMMAND} --by subset --shard {i}/4 --out part{i}.jsonl")
        assert capsys.readouterr().out == ""
    command("merge part1.jsonl part2.jsonl part3.jsonl part4.jsonl --out joined.jsonl")
    assert capsys.readouterr().out == whole
    assert manifest(bench / "joined.jsonl") == manifest(bench / "whole.jsonl")
    assert (bench / "joined.jsonl").read_bytes() == (bench / "whole.jsonl").read_bytes()


def test_rows_of_whole_dialogues_and_renamed_columns(bench):
    dialogues = [
        {"chosen": f"\n\nHuman: Q\n\nAssistant: {w}", "rejected": f"\n\nHuman: Q\n\nAssistant: {x}", "kind": subset}
        for subset, w, x in BENCH
    ]
    (bench / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    command(f"{COMMAND} --by kind --out scored.jsonl")
    assert manifest(bench / "scored.jsonl")["accuracy_by"] == {"chat": CHAT, "code": CODE}
    named = [{"prompt": "Q", "good": w, "bad": x, "subset": subset} for subset, w, x in BENCH]
    (bench / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    line = COMMAND.replace("bench.jsonl", "named.jsonl") + " --columns chosen=good,rejected=bad"
    command(f"{line} --by subset --out named.scored.jsonl")
    assert manifest(bench / "named.scored.jsonl")["accuracy_by"] == {"chat": CHAT, "code": CODE}


@pytest.mark.parametrize(
    ("row", "by", "said"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "subset", "bench.jsonl:7: field 'subset': missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "subset": None}, "subset", "field 'subset': missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "subset": ["x"]}, "subset", "expected a text or a number"),
        (None, "subsets", "hint: did you mean --by subset?"),
    ],
)
def test_a_row_without_the_column_is_refused(bench, capsys, row, by, said):
    if row:
        with open(bench / "bench.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    command(f"{COMMAND} --by {by} --out no.jsonl", code=2)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(bench.glob("no.jsonl*"))


def test_a_column_of_other_rows_or_of_too_many_values_is_refused(bench, capsys):
    (bench / "texts.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c", "subset": "s"}) + "\n")
    command(f"{COMMAND.replace('bench', 'texts')} --by subset --out no.jsonl", code=2)
    assert "its first row is no preference" in " ".join(capsys.readouterr().err.split())
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b c", "id": i} for i in range(201)]
    (bench / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(f"{COMMAND} --by id --out no.jsonl", code=2)
    assert "the column has 201 values" in capsys.readouterr().err


def test_counts_of_no_pairs():
    assert accuracy.metrics_of({}) == {"accuracy": None, "pairs": 0, "ties": 0}
    empty = shard_totals.of_score({"rows": 0, "chosen_sum": 0.0, "rejected_sum": 0.0, "by": {}})
    assert empty["mean_chosen_score"] == 0.0 and empty["pairs"] == 0


def test_stored_ids_score_as_they_are(rewarded):
    """Both sides of make-prefs' own rows have the scores that their samples have, cut ones included."""
    rewarded.run("score --data samples.jsonl --scorer rm --out of-samples.jsonl")
    of = {(row["prompt_id"], row["k"]): row["score"] for row in rewarded.rows("of-samples.jsonl")}
    rewarded.run("score --data prefs.jsonl --scorer rm --out of-pairs.jsonl")
    for row in rewarded.rows("of-pairs.jsonl"):
        for side in ("chosen", "rejected"):
            assert row[f"{side}_score"] == pytest.approx(of[row["prompt_id"], row[f"{side}_k"]], abs=1e-5)
    assert score_type_of(str(rewarded.folder / "of-pairs.jsonl")) == "reward"  # which distill and soft labels ask for


def test_train_rm_tells_its_held_out_accuracy_by_column(rewarded):
    rows = rewarded.rows("prefs.jsonl")
    kinds = [row | {"subset": "abc"[i % 3]} for i, row in enumerate(rows)]
    (rewarded.folder / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kinds))
    line = " ".join(REWARD_MODEL).replace("--data prefs.jsonl", "--data kinds.jsonl")
    out, _ = rewarded.run(line, "--by subset --out rm-by")
    found = rewarded.manifest("rm-by")["metrics"]
    by = found["held_out_by"]
    assert set(by["accuracy_by"]) <= {"a", "b", "c"} and len(by["accuracy_by"]) > 1
    assert by["pairs"] == found["validation_pairs"] == sum(of["pairs"] for of in by["accuracy_by"].values())
    assert by["ties"] == 0 and by["accuracy"] == pytest.approx(found["eval/accuracy"])
    total = sum(of["accuracy"] * of["pairs"] for of in by["accuracy_by"].values())
    assert total / by["pairs"] == pytest.approx(by["accuracy"])
    assert "Held-out accuracy by subset" in out and "all pairs" in out
    assert rewarded.digest("rm-by/model.safetensors") == rewarded.digest("rm/model.safetensors")
    for more in ([], ["--dry-run"]):
        _, err = rewarded.run("train-rm --model sft --data prefs.jsonl --by subset --out no-rm", *TRAIN, *more, code=2)
        assert "prefs.jsonl:1: field 'subset': missing (--by subset)" in " ".join(err.split())


def test_the_table_has_every_group():
    counts = accuracy.tally([1, 2, 3], [0, 2, 4], ["b", "a", "b"])
    shown = table("subset", accuracy.metrics_of(counts))
    assert [row[:2] for row in shown.rows] == [
        ["a", "0.500"],
        ["b", "0.500"],
        ["mean of 2 groups", "0.500"],
        ["all pairs", "0.500"],
    ]
