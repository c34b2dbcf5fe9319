"""Shards of a command: merged they are byte-identical to one run; gaps, duplicates and other runs are refused."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpoctl.cli.app import run as command_line
from dpoctl.inference.evaluation_shards import PART, merged, part_of, pooled
from dpoctl.inference.text_statistics import mean_se
from dpoctl.outputs.shards import shard_range, slices
from dpoctl.stages import judge, score
from helpers.chain import ROOT, lines_in
from helpers.ranks import start_ranks

SHARDS = 3
LENGTHS = "python:lengths.py:f"
COMMANDS = {
    "sample": (
        "--model lm --prompts test.jsonl --n 2 --temperature 0.5,1 --generation-batch-size 6 --max-new-tokens 8"
    ).split(),
    "make-prefs": (
        "--model lm --prompts train.jsonl --scorer classifier --completions 3 "
        "--generation-batch-size 15 --max-new-tokens 8"
    ).split(),
    "score": ["--data", "sample.jsonl", "--scorer", "classifier"],
    "judge": [
        *"sample.jsonl other.jsonl --backend scorer --scorer".split(),
        LENGTHS,
        *"--canary so --compare base.jsonl".split(),
    ],
}
EVALUATE = (
    "evaluate --model sft --model lm --ref lm --lm sft --prompts test.jsonl --completions sample.jsonl "
    "--completions other.jsonl --scorer classifier --n 2 --max-new-tokens 6 --generation-batch-size 6"
).split()


@pytest.fixture
def here(prefs, monkeypatch):
    """The miniature world as the working directory, with batches small enough for its few rows."""
    world = prefs
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", world.env["XDG_CACHE_HOME"])
    monkeypatch.setattr(score, "_BATCH", 9)
    monkeypatch.setattr(judge, "_BATCH", 5)
    return world


@pytest.fixture
def run(here, capsys):
    """A function that runs a command line in this process and returns its stderr on one line."""

    def call(*args: str, code: int = 0) -> str:
        capsys.readouterr()
        got = command_line([str(a) for a in args])
        err = capsys.readouterr().err
        assert got == code and "Traceback" not in err, err
        return " ".join(err.split())

    return call


@pytest.fixture
def inputs(run, here):
    """What later stages read: samples, other samples, and judgements to compare with."""
    (here.folder / "lengths.py").write_text("def f(rows):\n    return [len(r['completion']) for r in rows]\n")
    run("sample", *COMMANDS["sample"], "--out", "sample.jsonl")
    run("sample", *COMMANDS["sample"], "--seed", "1", "--out", "other.jsonl")
    run("judge", "other.jsonl", "sample.jsonl", "--backend", "scorer", "--scorer", LENGTHS, "--out", "base.jsonl")


@pytest.mark.parametrize("stage", COMMANDS)
def test_merged_shards_are_byte_identical_to_one_run(stage, inputs, run, here):
    further = (lambda name: ["--completions-out", f"of.{name}"]) if stage == "make-prefs" else lambda name: []
    whole, joined = f"{stage}.whole.jsonl", f"{stage}.joined.jsonl"
    run(stage, *COMMANDS[stage], "--out", whole, *further(whole))
    shards = [f"{stage}.{i}.jsonl" for i in range(1, SHARDS + 1)]
    for i, name in enumerate(shards, 1):
        run(stage, *COMMANDS[stage], "--shard", f"{i}/{SHARDS}", "--out", name, *further(name))
    run("merge", *reversed(shards), "--out", joined)
    assert here.digest(joined) == here.digest(whole)
    if stage == "make-prefs":
        run("merge", *(f"of.{name}" for name in shards), "--out", "of.joined.jsonl")
        assert here.digest("of.joined.jsonl") == here.digest(f"of.{whole}")

    made, one = here.manifest(joined), here.manifest(whole)
    assert "shard" not in made and made["identity"] == one["identity"] and made["inputs"] == one["inputs"]
    assert json.loads(json.dumps(made["metrics"]), parse_float=lambda x: pytest.approx(float(x))) == one["metrics"]
    assert made["outputs"][0] == one["outputs"][0] | {"path": joined}
    # the merged output is complete for the command without --shard too
    assert "nothing to do" in run(stage, *COMMANDS[stage], "--out", joined)
    assert "nothing to do" in run("merge", *shards, "--out", joined)

    places = [here.manifest(name)["shard"] for name in shards]
    assert [p["first"] for p in places] == [sum(p["count"] for p in places[:i]) for i in range(SHARDS)]
    assert sum(p["count"] for p in places) == places[0]["total"]
    assert all(p["count"] for p in places)


def test_shards_of_evaluate_share_the_prompts_and_merge_to_the_numbers_of_one_run(inputs, run, here, capsys):
    """12 prompts in batches of 3: three shards of 3, 3 and 6; two files: one for each of the last two shards."""
    run(*EVALUATE, "--out", "e.whole.jsonl")
    shards = [f"e.{i}.jsonl" for i in range(1, SHARDS + 1)]
    for i, name in enumerate(shards, 1):
        run(*EVALUATE, "--shard", f"{i}/{SHARDS}", "--out", name)
    assert [[row["n"] for row in here.rows(name)] for name in shards] == [[6, 6], [6, 6, 48], [12, 12, 48]]
    assert command_line(["merge", *shards, "--out", "e.joined.jsonl", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    run("merge", *reversed(shards), "--out", "e.joined.jsonl")
    joined, whole = here.rows("e.joined.jsonl"), here.rows("e.whole.jsonl")
    assert [row["model"] for row in joined] == ["sft", "lm", "sample.jsonl", "other.jsonl"]
    for one, other in zip(joined, whole, strict=True):
        assert {k: pytest.approx(v, rel=1e-5, abs=1e-6) if isinstance(v, float) else v for k, v in one.items()} == other
    assert whole[0]["kl"] > 0 and whole[0]["perplexity_lm"] != whole[0]["perplexity_ref"]
    made, one = here.manifest("e.joined.jsonl"), here.manifest("e.whole.jsonl")
    assert "shard" not in made and made["identity"] == one["identity"] and made["metrics"] == one["metrics"]
    assert made["outputs"][0]["rows"] == 4
    assert "nothing to do" in run(*EVALUATE, "--out", "e.joined.jsonl")
    said = run("report", shards[0], "--out", "e.report", code=2)
    assert "e.1.jsonl: a shard of evaluate" in said and "dpoctl merge joins shards" in said


def test_with_more_shards_than_batches_of_prompts_some_have_no_row_of_a_model(inputs, run, here):
    command = "evaluate --model sft --ref lm --prompts test.jsonl --scorer classifier --max-new-tokens 4".split()
    for i in (1, 2):
        run(*command, "--shard", f"{i}/2", "--out", f"f.{i}.jsonl")
    assert [len(here.rows(f"f.{i}.jsonl")) for i in (1, 2)] == [0, 1]
    run("merge", "f.1.jsonl", "f.2.jsonl", "--out", "f.jsonl")
    assert [row["n"] for row in here.rows("f.jsonl")] == [12]
    plan = [*command, "--shard", "1/2", "--out", "never.jsonl", "--dry-run"]
    assert run(*plan) == ""


def test_each_perplexity_is_pooled_over_the_tokens_of_its_own_model():
    """Another model's tokenizer may take more tokens for the same texts."""
    same = {"n": 1, "ended": 1.0, "repetition": 0.0}
    parts = [
        [same | {"perplexity_ref": math.exp(1), "perplexity_lm": math.exp(1), PART: part_of(["a"], ["1"], 1, 4)}],
        [same | {"perplexity_ref": math.exp(3), "perplexity_lm": math.exp(3), PART: part_of(["b"], ["2"], 3, 1)}],
    ]
    [row] = merged(parts)
    assert math.log(row["perplexity_ref"]) == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert math.log(row["perplexity_lm"]) == pytest.approx((4 * 1 + 1 * 3) / 5)


@given(st.lists(st.lists(st.floats(-9, 9), min_size=1, max_size=5), min_size=1, max_size=5))
def test_pooled_means_and_errors_are_those_of_all_values(parts):
    mean, error = pooled([(*mean_se(part), len(part)) for part in parts])
    expected = mean_se([value for part in parts for value in part])
    assert (mean, error) == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 12))
def test_each_batch_is_in_one_shard_and_shards_differ_by_one_batch_at_most(sizes, of):
    batches, end = [], 0
    for size in sizes:
        batches.append(slice(end, end := end + size))
    shares = [shard_range(f"{i}/{of}", batches) for i in range(1, of + 1)]
    assert [batch for share in shares for batch in batches[share.batches]] == batches
    for share in shares:
        held = batches[share.batches]
        assert share.count == sum(batch.stop - batch.start for batch in held) and share.total == end
        assert not held or share.first == held[0].start
    counts = [len(batches[share.batches]) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert shard_range(None, batches).count == end and shard_range(None, batches).record({}) is None


def test_the_last_batch_holds_the_remainder():
    assert slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)] and slices(0, 2) == []


# --- what merge refuses ----------------------------------------------------------------------------------------------


@pytest.fixture
def shards(run, here):
    """Three shards of a cheap command, s1.jsonl to s3.jsonl, and the command without --shard and --out."""
    (here.folder / "lengths.py").write_text(
        "def f(rows):\n    return [len(r['completion']) for r in rows]\n"
        "def g(rows):\n    return [-value for value in f(rows)]\n"
    )
    rows = [{"prompt_id": f"p{i}", "prompt": "I", "completion": "x" * i, "k": 0} for i in range(1, 31)]
    (here.folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["score", "--data", "in.jsonl", "--scorer", LENGTHS]
    for i in range(1, 4):
        run(*command, "--shard", f"{i}/3", "--out", f"s{i}.jsonl", "--overwrite")
    return command


def test_gaps_duplicates_and_foreign_shards_are_refused(shards, run, here):
    run(*shards, "--out", "w.jsonl")
    run(*shards, "--shard", "2/4", "--out", "of4.jsonl")
    (here.folder / "more.py").write_text("def f(rows):\n    return [2 * len(r['completion']) for r in rows]\n")
    run(*shards[:-1], "python:lengths.py:g", "--shard", "2/3", "--out", "option.jsonl")
    (here.folder / "in2.jsonl").write_text((here.folder / "in.jsonl").read_text() + "\n")
    run("score", "--data", "in2.jsonl", "--scorer", LENGTHS, "--shard", "2/3", "--out", "input.jsonl")
    run("sample", *COMMANDS["sample"], "--shard", "2/3", "--out", "stage.jsonl")
    run(*shards[:-1], "python:more.py:f", "--shard", "2/3", "--out", "scorer.jsonl")
    (here.folder / "begun.jsonl.plan.json").write_text("{}")
    (here.folder / "plain.jsonl").write_text("{}\n")
    for given_, said in (
        (["s1", "s3"], "shard 2 is missing of 3"),
        (["s2"], "shards 1, 3 are missing of 3"),
        (["s1", "s2", "s2", "s3"], "shard 2 of 3 is given twice: s2.jsonl and s2.jsonl"),
        (["s1", "of4", "s3"], "of4.jsonl and s1.jsonl: of 4 shards and of 3"),
        (["s1", "option", "s3"], "option.jsonl and s1.jsonl: --scorer g and f"),
        (["s1", "input", "s3"], "input.jsonl and s1.jsonl: made from different --data"),
        (["s1", "scorer", "s3"], "scorer.jsonl and s1.jsonl: made from different --scorer"),
        (["s1", "stage", "s3"], "shards of sample and of score"),
        (["s1", "begun", "s3"], "begun.jsonl: not complete yet"),
        (["s1", "plain", "s3"], "plain.jsonl: not a shard: it has no manifest"),
        (["s1", "nowhere", "s3"], "nowhere.jsonl: no such file"),
        (["s1", "w", "s3"], "w.jsonl: not a shard, by w.jsonl.manifest.json"),
    ):
        error = run("merge", *(f"{name}.jsonl" for name in given_), "--out", "no.jsonl", code=2)
        assert said in error and error.count("error:") == 1 and "hint:" in error
    assert not list(here.folder.glob("no.jsonl*"))
    assert "is also an input of this command" in run(
        "merge", "s1.jsonl", "s2.jsonl", "s3.jsonl", "--out", "s2.jsonl", code=2
    )
    assert "--base has no effect with shards" in run("merge", "s1.jsonl", "--base", "lm", "--out", "no.jsonl", code=2)
    assert "the directory of one adapter" in run("merge", "s1.jsonl", "lm", "--out", "no.jsonl", code=2)


def test_a_damaged_shard_is_refused_and_a_merge_does_not_overwrite(shards, run, here):
    names = [f"s{i}.jsonl" for i in (1, 2, 3)]
    run("merge", *names, "--out", "kept-shards.jsonl", "--dry-run")
    assert not (here.folder / "kept-shards.jsonl").exists()
    run(*shards[:-1], "python:lengths.py:g", "--out", "kept-shards.jsonl")
    assert "was started with --scorer g" in run("merge", *names, "--out", "kept-shards.jsonl", code=2)
    run("merge", *names, "--out", "kept-shards.jsonl", "--overwrite")
    damaged = bytearray((here.folder / "s2.jsonl").read_bytes())
    damaged[20] ^= 1
    (here.folder / "s2.jsonl").write_bytes(damaged)
    assert "s2.jsonl: changed or damaged" in run("merge", *names, "--out", "new.jsonl", code=2)


@pytest.mark.parametrize("shard", ["0/4", "5/4", "x", "1/0", "-1/4", "1", "1/4/2", "1.5/4", ""])
def test_a_shard_is_one_to_n(shard, run):
    """An empty text must not be taken for no shard at all."""
    error = run("score", "--data", "train.jsonl", "--scorer", LENGTHS, "--shard", shard, "--out", "no.jsonl", code=2)
    assert f"--shard {shard}: expected I/N with I from 1 to N" in error and error.count("error:") == 1


@pytest.mark.slow
def test_a_killed_shard_resumes_to_the_same_bytes(inputs, run, here):
    args = ["make-prefs", *COMMANDS["make-prefs"], "--generation-batch-size", "3", "--shard", "2/2"]
    run(*args, "--out", "calm.jsonl")
    here.kill(*args, "--out killed.jsonl", when=lambda: lines_in(here.folder / "killed.jsonl.progress") >= 2)
    assert not (here.folder / "killed.jsonl").exists()
    assert "was started with --shard 2/2, now it is 1/2" in run(*args[:-1], "1/2", "--out", "killed.jsonl", code=2)
    assert "resuming after" in run(*args, "--out", "killed.jsonl")
    assert here.digest("killed.jsonl") == here.digest("calm.jsonl")
    assert here.manifest("killed.jsonl")["shard"] == here.manifest("calm.jsonl")["shard"]


# --- the ranks of torchrun -------------------------------------------------------------------------------------------


def test_two_ranks_write_a_shard_each_and_rank_0_merges_them(inputs, run, here):
    args = ["make-prefs", *COMMANDS["make-prefs"]]
    ranked = [*args, "--out", "ranks.jsonl", "--completions-out", "ranks.samples.jsonl"]
    run(*args, "--out", "alone.jsonl", "--completions-out", "alone.samples.jsonl")
    # a file of other options that is named like the shard of rank 1 is not taken for it
    run(*args, "--seed", "5", "--shard", "2/2", "--out", "ranks.shard-0002-of-0002.jsonl")
    processes = start_ranks(here, *ranked, "--overwrite", command=here.warm)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    bars = re.findall(r"^  \d\.\d-\d\.\d #* *(\d+)$", "".join(said), re.M)  # one histogram, of all samples
    assert len(bars) == 10 and sum(map(int, bars)) == here.manifest("ranks.jsonl")["metrics"]["samples"]
    for name in (".jsonl", ".samples.jsonl"):
        assert here.digest(f"ranks{name}") == here.digest(f"alone{name}")
    assert here.manifest("ranks.shard-0002-of-0002.jsonl")["shard"]["number"] == 2
    assert (here.folder / "ranks.samples.shard-0001-of-0002.jsonl").exists()
    assert "nothing to do" in run(*ranked)  # the same output without torchrun


def test_under_torchrun_in_this_process(shards, run, here, monkeypatch):
    """Rank 0 waits for --rank-timeout at most; a complete output is left alone; --shard is refused."""

    def as_rank(number: int, *args: str, code: int = 0) -> str:
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        try:
            return run(*args, code=code)
        finally:
            monkeypatch.delenv("RANK", raising=False)
            monkeypatch.delenv("WORLD_SIZE", raising=False)

    said = as_rank(0, *shards, "--out", "r.jsonl", "--rank-timeout", "0.01", code=75)
    assert "r.shard-0002-of-0002.jsonl: no progress for 0.01 minutes" in said and "hint:" in said
    assert not (here.folder / "r.jsonl").exists()
    run(*shards, "--out", "r.shard-0002-of-0002.jsonl")  # a complete output, not a shard
    as_rank(0, *shards, "--out", "r.jsonl", "--rank-timeout", "0.01", code=75)
    assert "now it is 2/2" in as_rank(1, *shards, "--out", "r.jsonl", code=2)
    as_rank(1, *shards, "--out", "r.jsonl", "--overwrite")
    as_rank(0, *shards, "--out", "r.jsonl")
    run(*shards, "--out", "all.jsonl")
    assert here.digest("r.jsonl") == here.digest("all.jsonl")
    assert "nothing to do" in as_rank(0, *shards, "--out", "r.jsonl")
    assert as_rank(1, *shards, "--out", "r.jsonl") == ""
    assert "was started with" in as_rank(0, *shards[:-1], "python:lengths.py:g", "--out", "r.jsonl", code=2)
    assert "ranks split the work themselves" in as_rank(0, *shards, "--shard", "1/2", "--out", "x.jsonl", code=2)
    assert "has no effect with --backend human" in as_rank(
        1, "judge", "in.jsonl", "in.jsonl", "--backend", "human", "--form", "f.html", "--out", "x.jsonl", code=2
    )


def test_merging_shards_imports_no_torch(shards, here):
    """Merging takes seconds on a login node."""
    code = (
        "import sys; from dpoctl.cli.app import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    args = ["merge", "s1.jsonl", "s2.jsonl", "s3.jsonl", "--out", "light.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=here.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
