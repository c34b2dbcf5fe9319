"""judge with more than two candidates: pairs, baselines, candidates that are added, shards, refusals, the report."""

import json
import os
import re
import shutil
import subprocess

import pytest

from dpoctl.outputs.tournaments import names_of
from dpoctl.reports import figures, page
from dpoctl.reports.collect import collect
from dpoctl.tasks import toy_text
from helpers import judging
from helpers.chain import ROOT
from helpers.judge_server import JudgeServer, Special
from helpers.judging import fenced, rows_of, run, write

pytestmark = pytest.mark.usefixtures("warm_judge")
SCORER = ["--backend", "scorer", "--scorer", "python:truth.py:reward", "--criterion", "sentiment"]


def metrics_at(path) -> dict:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())["metrics"]


# --- by the ground truth of the toy world


@pytest.fixture
def toy(tmp_path):
    """Four policies: the best of 1, 2, 4 and 8 reviews by the toy task's own log-odds; rewards by policy and prompt."""
    prompts, rewards, truth = 120, {}, {}
    for seed, (name, n) in enumerate({"base": 1, "sft": 2, "ppo": 4, "dpo": 8}.items()):
        drawn = toy_text.reviews(2 * prompts * n, 100 + seed)
        drawn = [drawn[(i * 7919) % len(drawn)] for i in range(len(drawn))]
        rows = []
        for i in range(prompts):
            best = max(drawn[i * n : (i + 1) * n], key=lambda review: review["positive"])
            truth[best["text"]] = best["positive"]
            rewards[name, i] = best["positive"]
            rows.append({"prompt_id": f"p{i}", "prompt": "Film:", "completion": best["text"], "k": 0, "finish": "stop"})
        write(tmp_path / f"samples.{name}.jsonl", rows)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "truth.py").write_text(
        "import json\nTRUTH = json.load(open('truth.json'))\n"
        "def reward(rows):\n    return [TRUTH[row['completion']] for row in rows]\n"
    )
    return tmp_path, rewards


def test_the_scores_are_in_the_order_of_the_rewards(toy):
    here, rewards = toy
    out, _ = run(here, *(f"samples.{n}.jsonl" for n in ("sft", "dpo", "base", "ppo")), *SCORER, "--out", "t.jsonl")
    metrics = metrics_at(here / "t.jsonl")
    mean = {n: sum(rewards[n, i] for i in range(120)) / 120 for n in ("base", "sft", "ppo", "dpo")}
    assert sorted(mean, key=mean.get) == ["base", "sft", "ppo", "dpo"]
    assert [s["candidate"] for s in metrics["scores"]] == [f"samples.{n}" for n in ("dpo", "ppo", "sft", "base")]
    for pair in metrics["pairs"]:
        a, b = (pair[side].removeprefix("samples.") for side in ("a", "b"))
        won = sum((x > y) + (x == y) / 2 for x, y in ((rewards[a, i], rewards[b, i]) for i in range(120)))
        assert pair["win_rate"] == pytest.approx(won / 120) and pair["n"] == 120 and pair["flips"] == 0
        assert pair["interval"][0] < pair["implied"] < pair["interval"][1]
    assert sum(s["score"] for s in metrics["scores"]) == pytest.approx(0, abs=1e-9)
    assert metrics["scores"][0]["interval"][0] > metrics["scores"][1]["interval"][1]  # dpo and ppo are told apart
    rows = rows_of(here / "t.jsonl")
    assert len(rows) == 120 * 6 * 2 and [row["prompt_id"] for row in rows[:12]] == ["p0"] * 12
    assert {(r["a_of"], r["b_of"]) for r in rows[:12]} == {(p["a"], p["b"]) for p in metrics["pairs"]}
    assert "Judge: python:truth.py:reward, criterion sentiment, both orders; asked 20" in " ".join(out.split())


def test_a_baseline_and_a_limit_of_prompts(toy):
    here, _ = toy
    files = [f"samples.{n}.jsonl" for n in ("dpo", "sft", "base")]
    run(here, *files, *SCORER, *"--baseline samples.sft.jsonl --limit 40 --out among.jsonl".split())
    run(here, files[0], files[2], *SCORER, *"--baseline samples.sft.jsonl --limit 40 --out beside.jsonl".split())
    for name in ("among", "beside"):
        metrics = metrics_at(here / f"{name}.jsonl")
        of = {s["candidate"]: s for s in metrics["scores"]}
        assert {(p["a"], p["b"]) for p in metrics["pairs"]} == {
            (f"samples.{n}", "samples.sft") for n in ("dpo", "base")
        }
        assert of["samples.sft"]["score"] == 0 and of["samples.sft"]["interval"] is None
        dpo = next(p for p in metrics["pairs"] if p["a"] == "samples.dpo")
        assert of["samples.dpo"]["win_over_baseline"] == pytest.approx(dpo["win_rate"], abs=1e-3) and dpo["n"] == 40
    assert len(rows_of(here / "beside.jsonl")) == 40 * 2 * 2
    out, _ = run(here, *files, *SCORER, *"--limit 40 --out plan.jsonl --dry-run".split())
    of_two, _ = run(here, *files[:2], *SCORER, *"--limit 40 --out plan.jsonl --dry-run".split())
    found = [next(line for line in text.splitlines() if line.startswith("difference found")) for text in (out, of_two)]
    assert found[0] == found[1] and "judgements             240" in out  # the difference is that of one pair


# --- added candidates


def candidates(folder, prompts: int, **strengths: int) -> list[str]:
    """A completions file for each policy, whose texts hold its strength."""
    files = []
    for name, strength in strengths.items():
        row = {"k": 0, "finish": "stop"}
        rows = [
            {"prompt_id": f"p{i}", "prompt": f"Q {i}?", "completion": f"{name} {strength}"} | row
            for i in range(prompts)
        ]
        files.append(write(folder / f"{name}.jsonl", rows))
    return files


def stronger(text: str) -> str:
    """Prefers strength, but of every third prompt the first candidate."""
    prompt, a, b = fenced(text)
    if int(re.search(r"\d+", prompt)[0]) % 3 == 0:
        return "Preferred: A"
    return f"Preferred: {'A' if int(a.split()[1]) > int(b.split()[1]) else 'B'}"


def sorted_rows(path) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows_of(path))


def test_an_added_candidate_costs_only_what_is_new(tmp_path):
    files = candidates(tmp_path, 30, one=1, two=2, three=3, four=4)
    with JudgeServer(stronger) as server:
        common = ["--model", "m", "--base-url", server.url, "--seed", "3"]
        run(tmp_path, *files[:3], *common, "--out", "t.jsonl")
        assert sum(server.served.values()) == 30 * 3 * 2
        shutil.rmtree(tmp_path / "cache")  # whatever is asked twice would be paid twice
        run(tmp_path, "--add", files[3], "--to", "t.jsonl", *common, "--out", "t2.jsonl")
        assert sum(server.served.values()) == 30 * 6 * 2 and max(server.served.values()) == 1
        run(tmp_path, *files, *common, "--out", "whole.jsonl")
    before, after = (tmp_path / "t.jsonl").read_bytes(), (tmp_path / "t2.jsonl").read_bytes()
    assert after.startswith(before) and sorted_rows(tmp_path / "t2.jsonl") == sorted_rows(tmp_path / "whole.jsonl")
    added, whole = metrics_at(tmp_path / "t2.jsonl"), metrics_at(tmp_path / "whole.jsonl")
    for one, other in zip(added["scores"], whole["scores"], strict=True):
        assert one["candidate"] == other["candidate"] and one["score"] == pytest.approx(other["score"])
        assert one["interval"] == pytest.approx(other["interval"], abs=1e-6)
    manifest = json.loads((tmp_path / "t2.jsonl.manifest.json").read_text())
    assert [(i["name"], i["path"]) for i in manifest["inputs"]] == [
        ("to", "t.jsonl"),
        ("candidates", "four.jsonl"),
        *(("opponents", f"{n}.jsonl") for n in ("one", "two", "three")),
    ]
    (tmp_path / "elsewhere").mkdir()
    five = candidates(tmp_path, 30, five=5)[0]
    with JudgeServer(stronger) as server:  # to what was added to before, from another folder; another address is minor
        common = ["--model", "m", "--base-url", server.url, "--seed", "3"]
        (tmp_path / "t.jsonl").unlink()
        _, err = run(tmp_path, "--add", five, "--to", "t2.jsonl", *common, "--out", "elsewhere/t3.jsonl")
        assert sum(server.served.values()) == 30 * 4 * 2 and "judged with other settings: --base-url" in err
    assert [s["candidate"] for s in metrics_at(tmp_path / "elsewhere/t3.jsonl")["scores"]][0] == "five"


@pytest.mark.slow
def test_a_stopped_addition_resumes(tmp_path):
    """The judge is down after 70 comparisons, in the second batch."""
    files = candidates(tmp_path, 30, one=1, two=2, three=3, four=4)
    down = {"at": 70 * 2}

    def decide(text: str):
        if sum(server.served.values()) >= down["at"]:
            return Special(503, {"error": {"message": "busy"}})
        return stronger(text)

    with JudgeServer(stronger) as server:
        common = ["--model", "m", "--base-url", server.url, "--retries", "0"]
        run(tmp_path, *files[:3], *common, "--out", "t.jsonl")
        run(tmp_path, "--add", files[3], "--to", "t.jsonl", *common, "--out", "whole.jsonl")
        shutil.rmtree(tmp_path / "cache")
        server.decide, add = decide, ["--add", files[3], "--to", "t.jsonl", *common, "--out", "t2.jsonl"]
        server.served.clear()
        run(tmp_path, *add, code=75)
        partial = (tmp_path / "t2.jsonl.partial").read_bytes()
        assert partial.startswith((tmp_path / "t.jsonl").read_bytes()) and partial.count(b"\n") == 30 * 3 * 2 + 64 * 2
        down["at"] = 10**6
        _, err = run(tmp_path, *add)
        assert "resuming after 308 rows" in err
        assert sum(server.served.values()) == 90 * 2 and max(server.served.values()) == 1
        assert (tmp_path / "t2.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        _, err = run(tmp_path, *add)
        assert "complete already" in err


def test_two_files_become_a_tournament_and_their_answers_serve_it(tmp_path):
    files = candidates(tmp_path, 8, one=1, two=2, three=3)
    with JudgeServer(stronger) as server:
        common = ["--model", "m", "--base-url", server.url]
        run(tmp_path, *files[:2], *common, "--canary", "0 0", "--out", "pair.jsonl")
        asked = sum(server.served.values())
        run(tmp_path, *files, *common, "--out", "all.jsonl")
        assert sum(server.served.values()) == asked + 8 * 2 * 2  # what pair.jsonl asked came from the cache
        run(tmp_path, "--add", files[2], "--to", "pair.jsonl", *common, "--out", "added.jsonl")
        assert sum(server.served.values()) == asked + 8 * 2 * 2
    assert sorted_rows(tmp_path / "added.jsonl") == sorted_rows(tmp_path / "all.jsonl")


def test_candidates_with_equal_texts_are_asked_about_once(tmp_path):
    """Of the six judgements with a prompt, three have the words of another."""
    files = candidates(tmp_path, 5, one=1, two=2)
    write(tmp_path / "copy.jsonl", [row | {"note": "x"} for row in rows_of(tmp_path / "two.jsonl")])
    with JudgeServer(stronger) as server:
        run(tmp_path, *files, "copy.jsonl", "--model", "m", "--base-url", server.url, "--out", "t.jsonl")
        assert sum(server.served.values()) == 5 * 3 and max(server.served.values()) == 1
    assert len(rows_of(tmp_path / "t.jsonl")) == 5 * 3 * 2
    found = {s["candidate"]: s["score"] for s in metrics_at(tmp_path / "t.jsonl")["scores"]}
    assert found["two"] == pytest.approx(found["copy"], abs=1e-6) and found["two"] > found["one"]


def test_shards_are_joined_to_the_whole(tmp_path):
    files = candidates(tmp_path, 90, one=1, two=2, three=3, four=4)
    (tmp_path / "truth.py").write_text(
        "def reward(rows):\n    return [float(r['completion'].split()[1]) for r in rows]\n"
    )
    run(tmp_path, *files[:3], *SCORER, "--out", "t.jsonl")
    add = ["--add", files[3], "--to", "t.jsonl", *SCORER]
    run(tmp_path, *add, "--out", "whole.jsonl")
    for given, out in (([*files[:3], *SCORER], "t"), (add, "whole")):
        for i in range(1, 4):
            run(tmp_path, *given, "--shard", f"{i}/3", "--out", f"s{i}.jsonl", "--overwrite")
        said = _merge(tmp_path, "s1.jsonl", "s2.jsonl", "s3.jsonl", "--out", "joined.jsonl", "--overwrite")
        assert "Bradley-Terry scores of joined.jsonl" in said
        assert (tmp_path / "joined.jsonl").read_bytes() == (tmp_path / f"{out}.jsonl").read_bytes()
        assert metrics_at(tmp_path / "joined.jsonl") == metrics_at(tmp_path / f"{out}.jsonl")
    _, err = run(tmp_path, *add, "--out", "joined.jsonl")
    assert "complete already" in err
    _, err = run(tmp_path, "--add", files[3], "--to", "s1.jsonl", *SCORER, "--out", "x.jsonl", code=2)
    assert "s1.jsonl: a shard of a tournament" in err


def _merge(folder, *args: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*judging.command, "merge", *args], cwd=folder, env=env, capture_output=True, text=True, check=True
    ).stdout


# --- refusals and warnings


@pytest.fixture(scope="module")
def judged(tmp_path_factory, warm):
    """A tournament of three, one of two files, one with references and one within a file; tests copy them."""
    here = tmp_path_factory.mktemp("judged")
    before, judging.command = judging.command, warm
    files = candidates(here, 4, one=1, two=2, three=3, four=4)
    (here / "truth.py").write_text("def reward(rows):\n    return [float(r['completion'].split()[1]) for r in rows]\n")
    rows = rows_of(here / "one.jsonl")
    write(here / "own.jsonl", [row | {"reference": "human 3"} for row in rows])
    write(here / "two-each.jsonl", [row | {"k": k, "completion": f"x {k}"} for row in rows for k in (0, 1)])
    run(here, *files[:3], *SCORER, "--out", "t.jsonl")
    run(here, *files[:2], *SCORER, "--out", "pair.jsonl")
    run(here, "own.jsonl", *SCORER, "--out", "reference.jsonl")
    run(here, "--within", "two-each.jsonl", *SCORER, "--out", "within.jsonl")
    judging.command = before
    return here


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--add four.jsonl --out o.jsonl", "--add needs --to"),
        ("four.jsonl --to t.jsonl --out o.jsonl", "--to has no effect without --add"),
        ("--add four.jsonl --to t.jsonl --limit 2 --out o.jsonl", "--limit has no effect with --add"),
        ("--add four.jsonl --to t.jsonl --baseline one.jsonl --out o.jsonl", "--baseline has no effect with --add"),
        ("--add four.jsonl --to none.jsonl --out o.jsonl", "none.jsonl: not found (--to)"),
        ("--add four.jsonl --to own.jsonl --out o.jsonl", "own.jsonl: no manifest beside it"),
        ("--add four.jsonl --to reference.jsonl --out o.jsonl", "compares one file with the references"),
        ("--add four.jsonl --to within.jsonl --out o.jsonl", "compares the samples of one file"),
        ("--add two.jsonl --to t.jsonl --out o.jsonl", "two.jsonl: is the candidate two of t.jsonl"),
        ("--add four.jsonl --to t.jsonl --criterion helpful --out o.jsonl", "--criterion sentiment and helpful"),
        ("--add four.jsonl --to t.jsonl --order random --out o.jsonl", "--order both and random"),
        ("one.jsonl two.jsonl three.jsonl --canary x --out o.jsonl", "--canary has no effect in a tournament"),
        ("one.jsonl two.jsonl three.jsonl --compare pair.jsonl --out o.jsonl", "--compare has no effect in a tourn"),
        ("one.jsonl two.jsonl three.jsonl --against pair.jsonl --out o.jsonl", "pair.jsonl:1: judgements of two files"),
        ("one.jsonl two.jsonl --compare t.jsonl --out o.jsonl", "t.jsonl:1: judgements of a tournament"),
        ("one.jsonl --baseline one.jsonl --out o.jsonl", "one.jsonl: is the only candidate"),
        ("--within one.jsonl two.jsonl --out o.jsonl", "--within compares the samples of one file"),
        ("one.jsonl two.jsonl other.jsonl --out o.jsonl", "no row of one has a counterpart"),
    ],
)
def test_mistakes_are_one_clear_message(judged, args, said):
    write(judged / "other.jsonl", [{"prompt_id": "x", "prompt": "other", "completion": "y 1", "k": 0}])
    given = [arg for arg in SCORER if "--criterion" not in args or arg not in ("--criterion", "sentiment")]
    _, err = run(judged, *args.split(), *given, code=2)
    assert said in " ".join(err.split()) and err.count("error:") == 1 and not list(judged.glob("o.jsonl*"))


def test_another_judge_or_a_changed_file_is_refused(judged, tmp_path):
    here = shutil.copytree(judged, tmp_path / "copy")
    add = ["--add", "four.jsonl", "--to", "t.jsonl", "--out", "o.jsonl"]
    (here / "other.py").write_text("def reward(rows):\n    return [1.0 for r in rows]\n")
    _, err = run(here, *add, "--backend", "scorer", "--scorer", "python:other.py:reward", *SCORER[-2:], code=2)
    assert "t.jsonl: another judge decided it: different files as --scorer" in " ".join(err.split())
    _, err = run(here, *add, "--model", "m", "--base-url", "http://127.0.0.1:9/v1", *SCORER[-2:], code=2)
    assert "--backend scorer and openai" in err
    (here / "elsewhere").mkdir()
    shutil.copy(here / "truth.py", here / "elsewhere/truth.py")  # the same scorer
    same = ["--backend", "scorer", "--scorer", "python:elsewhere/truth.py:reward", *SCORER[-2:]]
    run(here, *add[:-1], "same.jsonl", *same)
    write(here / "two.jsonl", [row | {"completion": "new 9"} for row in rows_of(here / "two.jsonl")])
    _, err = run(here, *add, *SCORER, code=2)
    assert "two.jsonl: has changed since t.jsonl was judged" in " ".join(err.split())
    rows = rows_of(here / "t.jsonl")
    write(here / "t.jsonl", [row | {"verdict": "a"} for row in rows])
    _, err = run(here, *add, *SCORER, code=2)
    assert "t.jsonl: its sha256 is not the one in" in " ".join(err.split())
    (here / "two.jsonl").unlink()
    _, err = run(here, *add, *SCORER, code=2)
    assert "two.jsonl: not found (a candidate of the tournament in --to)" in " ".join(err.split())


def test_a_comparison_with_another_judge_is_warned_of(judged, tmp_path):
    here = shutil.copytree(judged, tmp_path / "copy")
    (here / "other.py").write_text("def reward(rows):\n    return [1.0 for r in rows]\n")
    other = ["--backend", "scorer", "--scorer", "python:other.py:reward", "--criterion", "helpful"]
    _, err = run(
        here, "three.jsonl", "two.jsonl", *other, *"--compare pair.jsonl --against pair.jsonl".split(), *_out(1)
    )
    said = " ".join(err.split())
    assert "pair.jsonl: judged in another way: --criterion sentiment and helpful; different files as --scorer" in said
    assert "pair.jsonl: its judge was asked another question: --criterion sentiment and helpful" in said
    _, err = run(
        here, "three.jsonl", "two.jsonl", *SCORER, *"--compare pair.jsonl --against pair.jsonl".split(), *_out(2)
    )
    assert "warning" not in err


def _out(number: int) -> list[str]:
    return ["--out", f"out{number}.jsonl"]


def test_another_judge_of_the_same_tournament(judged):
    _, err = run(judged, *(f"{n}.jsonl" for n in ("one", "two", "three")), *SCORER, "--against", "t.jsonl", *_out(3))
    assert "agreement with t.jsonl: 1.000, kappa 1.000 over 12 comparisons" in err


def test_names_are_those_of_files_with_as_many_folders_as_they_need():
    assert names_of(["a/samples.jsonl", "b/samples.dpo.jsonl.gz"]) == ["samples", "samples.dpo"]
    assert names_of(["runs/a/s.jsonl", "runs/b/s.jsonl"]) == ["a/s", "b/s"]
    assert names_of(["new/s.jsonl"], ["s", "a/s"]) == ["new/s"]


def test_a_prompt_that_a_file_lacks_is_told(tmp_path):
    files = candidates(tmp_path, 5, one=1, two=2, three=3)
    write(tmp_path / "two.jsonl", rows_of(tmp_path / "two.jsonl")[:3])
    (tmp_path / "truth.py").write_text(
        "def reward(rows):\n    return [float(r['completion'].split()[1]) for r in rows]\n"
    )
    _, err = run(tmp_path, *files, *SCORER, "--out", "t.jsonl")
    assert "2 of 5 prompts are not in every file" in " ".join(err.split())
    assert {(p["a"], p["b"]): p["n"] for p in metrics_at(tmp_path / "t.jsonl")["pairs"]}["one", "three"] == 5


# --- people, votes, the report


def test_people_judge_a_tournament_and_its_votes_make_preferences(tmp_path, made_run):
    files = candidates(tmp_path, 3, one=1, two=2, three=3)
    common = [*files, "--backend", "human", "--criterion", "helpful", "--out", "t.jsonl"]
    run(tmp_path, *common, "--form", "form.html")
    html = (tmp_path / "form.html").read_text()
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.DOTALL).group(1))
    assert len(data["items"]) == 9
    strength = lambda text: int(text.split()[1])  # noqa: E731
    answers = {i["id"]: "A" if strength(i["A"]) > strength(i["B"]) else "B" for i in data["items"]}
    for person in ("Ann", "Ben"):
        (tmp_path / f"{person}.json").write_text(
            json.dumps({"form": data["form"], "person": person, "answers": answers})
        )
    out, err = run(tmp_path, *common, "--answers", "Ann.json", "--answers", "Ben.json")
    assert [s["candidate"] for s in metrics_at(tmp_path / "t.jsonl")["scores"]] == ["three", "two", "one"]
    assert "of 2 people, over 9 comparisons that two or more answered" in " ".join(err.split())
    assert "agreement of human:Ann and human:Ben: 1.000" in err and "people (Ann, Ben)" in " ".join(out.split())
    made_run(tmp_path, "make-prefs --judgements t.jsonl --out prefs.jsonl")
    pairs = {(row["chosen"], row["rejected"]) for row in rows_of(tmp_path / "prefs.jsonl")}
    assert pairs == {("three 3", "two 2"), ("three 3", "one 1"), ("two 2", "one 1")}


@pytest.fixture
def made_run(warm):
    """Runs another command in a folder."""

    def call(folder, line: str) -> str:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*warm, *line.split()], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return call


def test_the_report_shows_scores_matrix_and_judges(toy, made_run):
    here, _ = toy
    files = [f"samples.{n}.jsonl" for n in ("dpo", "ppo", "sft", "base")]
    run(here, *files, *SCORER, "--out", "t.jsonl")
    run(here, *files[:2], *SCORER, "--out", "pair.jsonl")
    (here / "other.py").write_text("def reward(rows):\n    return [len(r['completion']) for r in rows]\n")
    other = ["--backend", "scorer", "--scorer", "python:other.py:reward", "--criterion", "sentiment"]
    run(here, *files[:2], *other, "--out", "by-length.jsonl")
    said = made_run(here, "report t.jsonl pair.jsonl by-length.jsonl --out report")
    told = " ".join(said.split())
    assert "dpo against ppo and dpo against ppo are judged in different ways: different files as --scorer" in told
    assert told.count("Judge of dpo against ppo: python:") == 2 and "Bradley-Terry scores of t" in told
    drawn = sorted(path.name for path in (here / "report/figures").glob("*.png"))
    assert drawn == ["tournament-scores.png", "tournament-wins.png"]
    html = (here / "report/report.html").read_text()
    today = re.search(r"asked (\d{4}-\d\d-\d\d)", html)[1]
    assert html.count(today) >= 4 and "Win rate of the row over the column" in html
    collected = collect((str(here / "t.jsonl"),))
    assert collected.contests[0].metrics["scores"] == metrics_at(here / "t.jsonl")["scores"]
    (here / "t.jsonl.manifest.json").unlink()
    collected = collect((str(here / "t.jsonl"),))  # rows alone
    shown = page.write(collected, figures.draw(collected, here / "figures"), "t")
    assert "dpo" in shown and collected.contests[0].judged_by.asked == ""
