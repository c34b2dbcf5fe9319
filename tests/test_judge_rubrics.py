"""Rubrics: several criteria in one request, a verdict for each, in rows, summaries, comparisons and pairs."""

import json
import re

import pytest

from dpoctl.errors import InputError
from dpoctl.judging.pairs import votes_of
from dpoctl.judging.prompts import load_criterion
from dpoctl.judging.rubrics import read_preference
from dpoctl.judging.verdicts import CUT_THOUGHT, NO_LINE, UNCLEAR
from dpoctl.reports.collect import collect
from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import candidates, fenced, judged, manifest, rows_of, run, write

pytestmark = pytest.mark.usefixtures("warm_judge")

RUBRIC = """
criteria:
  accuracy: Which answer is more accurate?
  good style: Which answer is written
    better?
  brevity: Which answer is shorter?
prompt_noun: question
candidate_noun: reply
"""


@pytest.fixture
def rubric(tmp_path):
    (tmp_path / "rubric.yaml").write_text(RUBRIC)
    return ["--criterion", "rubric.yaml"]


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("Preferred (good style): A", "A"),
        ("preferred (Good Style) : b.", "B"),
        ("**Preferred (good style):** B", "B"),
        ("**Preferred** (good_style): **A**", "A"),
        ("- Preferred (good-style): Candidate B (it flows)", "B"),
        ("2. Preferred for good style: A", "A"),
        ("Good style - Preferred: A", "A"),
        ("good style: B", "B"),
        ("**Good style**: [[A]]", "A"),
        ('"good style": "B",', "B"),
        ("Preferred (good style): tie", "tie"),
        ("Preferred (good style):\nA", "A"),
        ("Preferred (good style): A\nOn second thoughts:\nPreferred (good style): B", "B"),
        ("<think>\nPreferred (good style): A\n</think>\nPreferred (good style): B", "B"),
        ("Preferred (good style): A\nPreferred (brevity): B\nPreferred (style): B", "A"),
        ("good style: B is clearer than A is\nPreferred (good style): A", "A"),
        ("Preferred (good style): A\ngood style: what a pity for B", "A"),
        ("Preferred (good style): <A or B>", UNCLEAR),
        ("Preferred (good style): A or B", UNCLEAR),
        ("Preferred (good style): both", UNCLEAR),
        ("Preferred (good style): A; Preferred (brevity): B", UNCLEAR),
        ("Preferred (good style): <A>", "A"),
        ("Preferred (good style): Candidate <A>", "A"),
        ("Preferred (good styles): A", NO_LINE),
        ("Preferred (no good style at all): A", NO_LINE),
        ("Preferred: A", NO_LINE),
        ("good style: A is better written than B", NO_LINE),
        ("", NO_LINE),
        ("<think>\nPreferred (good style): A", CUT_THOUGHT),
    ],
)
def test_the_line_of_a_criterion(line, verdict):
    read = read_preference(line, "good style")
    assert (read.choice or read.reason) == verdict
    exchanged = read_preference(line.translate(str.maketrans("AB", "BA")), "good style")
    if verdict in ("A", "B") and "b." not in line:
        assert exchanged.choice == {"A": "B", "B": "A"}[verdict]


def test_a_request_asks_for_every_criterion(tmp_path, rubric):
    criterion = load_criterion(str(tmp_path / "rubric.yaml"))
    assert criterion.names == ("accuracy", "good style", "brevity") and criterion.rows_each == 3
    text = criterion.request("the prompt {a}", "one", "two", "key")
    assert "- accuracy: Which answer is more accurate?\n- good style: Which answer is written better?\n- brev" in text
    assert text.endswith(
        "Preferred (accuracy): <A or B>\nPreferred (good style): <A or B>\nPreferred (brevity): <A or B>"
    )
    assert fenced(text) == ["the prompt {a}", "one", "two"]
    assert "Question:" in text and "Candidate A (reply):" in text and re.search(r"\{\w+\}", text)[0] == "{a}"


def by_criteria(text: str) -> str:
    """Accurate is what is good, style prefers A whatever it is, and of brevity nothing is said in one order."""
    _, a, _ = fenced(text)
    good = "A" if "good" in a else "B"
    brevity = f"Preferred (brevity): {good}" if good == "A" else "They are equally brief."
    return f"One.\nPreferred (accuracy): {good}\nPreferred (good style): A\n{brevity}"


def test_a_verdict_for_each_criterion(tmp_path, rubric):
    """One request for each order, three rows each; summaries, invalid answers and flips are those of the criterion."""
    candidates(tmp_path, 5)
    with JudgeServer(by_criteria) as server:
        out, err = run(
            tmp_path, *"a.jsonl b.jsonl --model m --base-url".split(), server.url, *rubric, "--out", "j.jsonl"
        )
        assert server.requests == 10
        run(tmp_path, *"a.jsonl b.jsonl --model m --base-url".split(), server.url, *rubric, "--out", "again.jsonl")
        assert server.requests == 10  # the cache has them
    rows = rows_of(tmp_path / "j.jsonl")
    assert [(r["order"], r["criterion"]) for r in rows[:6]] == [
        (order, name) for order in ("AB", "BA") for name in ("accuracy", "good style", "brevity")
    ]
    found = manifest(tmp_path)["metrics"]["by_criterion"]
    assert list(found) == ["accuracy", "good style", "brevity"]
    summaries = {name: metrics["summary"] for name, metrics in found.items()}
    assert summaries["accuracy"]["win_rate"] == 1 and summaries["accuracy"]["flips"] == 0
    assert summaries["good style"]["ties"] == 5 and summaries["good style"]["flips"] == 1
    assert summaries["brevity"]["n"] == 0 and summaries["brevity"]["invalid"] == 0.5
    assert summaries["brevity"]["invalid_reasons"] == {NO_LINE: 5}
    assert all(name in out for name in found) and "5 judgements are invalid (50.0%)" in err
    shown = collect((str(tmp_path / "j.jsonl"),)).judged
    assert [(j.name, j.criterion) for j in shown] == [(f"a, {name}", name) for name in found]
    assert [j.summary for j in shown] == list(summaries.values())


def test_an_answer_without_verdicts_is_invalid_by_each_criterion(tmp_path, rubric):
    candidates(tmp_path, 2)
    with JudgeServer(lambda text: choice("Preferred (accuracy): A", finish="length")) as server:
        judged(tmp_path, server, *rubric)
    rows = rows_of(tmp_path / "j.jsonl")
    assert len(rows) == 12 and {(r["verdict"], r["reason"]) for r in rows} == {("invalid", "cut at the token limit")}


def test_an_interrupted_rubric_is_resumed(tmp_path, rubric):
    """Pending are requests, not the rows that they would give; the rerun asks for these alone."""
    candidates(tmp_path, 66)  # two batches
    down = {"now": True}

    def decide(text):
        lost = down["now"] and fenced(text)[0] in ("Question 3?", "Question 65?")
        return Special(503, {"error": {"message": "busy"}}) if lost else by_criteria(text)

    with JudgeServer(decide) as server:
        err = judged(tmp_path, server, *rubric, "--retries", "0", code=75)
        assert "4 judgements are pending" in err
        down["now"], before = False, server.requests
        judged(tmp_path, server, *rubric, "--retries", "0")
        assert server.requests == before + 4
    rows = rows_of(tmp_path / "j.jsonl")
    assert len(rows) == 66 * 6 and [r["prompt_id"] for r in rows[::6]] == [f"p{i}" for i in range(66)]


def test_criteria_are_compared_by_name(tmp_path, rubric):
    """--compare and --against: each criterion with its own of the other file; a file of one criterion with all."""
    candidates(tmp_path, 6)
    with JudgeServer(by_criteria) as server:
        common = ["a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url]
        run(tmp_path, *common, *rubric, "--out", "first.jsonl")
        judged(tmp_path, server, *rubric, "--against", "first.jsonl", "--compare", "first.jsonl")
        found = manifest(tmp_path)["metrics"]["by_criterion"]
        assert found["accuracy"]["against"] == {"raw": 1.0, "kappa": 1.0, "n": 6}
        assert found["good style"]["against"]["n"] == 6 and found["good style"]["compare"]["difference"] == 0
        write(tmp_path / "people.jsonl", [r | {"criterion": "helpful"} for r in rows_of(tmp_path / "first.jsonl")[::3]])
        run(tmp_path, *common, *rubric, "--out", "k.jsonl", "--against", "people.jsonl")
        told = json.loads((tmp_path / "k.jsonl.manifest.json").read_text())["metrics"]["by_criterion"]
        assert told["accuracy"]["against"]["raw"] == 1 and told["good style"]["against"]["raw"] == 0
        err = run(tmp_path, *common, "--out", "l.jsonl", "--against", "first.jsonl", code=2)[1]
        assert "first.jsonl: judged by accuracy, good style, brevity, not by helpful" in err


def test_shards_of_a_rubric_are_merged(tmp_path, rubric):
    candidates(tmp_path, 70)
    with JudgeServer(by_criteria) as server:
        common = ["a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, *rubric]
        for n in (1, 2):
            run(tmp_path, *common, "--shard", f"{n}/2", "--out", f"part-{n}.jsonl")
        run(tmp_path, *common, "--out", "j.jsonl")
    run(tmp_path, "part-1.jsonl", "part-2.jsonl", "--out", "joined.jsonl", stage="merge")
    assert (tmp_path / "joined.jsonl").read_bytes() == (tmp_path / "j.jsonl").read_bytes()
    joined = json.loads((tmp_path / "joined.jsonl.manifest.json").read_text())["metrics"]
    assert joined["by_criterion"] == manifest(tmp_path)["metrics"]["by_criterion"]


def test_each_criterion_has_a_vote_on_a_pair(tmp_path, rubric):
    """make-prefs: accuracy says good, style ties (A in both orders), brevity is invalid: half of the votes and more."""
    rows = [
        {"prompt_id": "p", "prompt": "Question?", "completion": text, "k": k, "finish": "stop"}
        for k, text in enumerate(("good one", "bad one"))
    ]
    write(tmp_path / "s.jsonl", rows)
    with JudgeServer(by_criteria) as server:
        at = ["--base-url", server.url, "--model", "m"]
        run(tmp_path, "s.jsonl", "--within", *at, *rubric, "--out", "votes.jsonl")
        at = ["--judge", "openai", "--judge-base-url", server.url, "--judge-model", "m", *rubric]
        run(tmp_path, "--samples", "s.jsonl", *at, "--out", "asked.jsonl", stage="make-prefs")
    run(tmp_path, "--judgements", "votes.jsonl", "--out", "voted.jsonl", stage="make-prefs")
    for name in ("asked", "voted"):
        (pair,) = rows_of(tmp_path / f"{name}.jsonl")
        assert (pair["chosen"], pair["rejected"]) == ("good one", "bad one"), name
        assert pair["chosen_share"] == 0.75 and pair["votes"] == 2, name


def test_one_criterion_is_one_vote():
    rows = [{"criterion": c, "verdict": v} for c, v in (("x", "a"), ("y", "b"), ("x", "a"), ("y", "a"))]
    assert votes_of(rows) == ["a", "tie"]


def test_a_rubric_of_one_criterion_is_for_people_too(tmp_path):
    candidates(tmp_path, 3)
    (tmp_path / "one.yaml").write_text("criteria: {kindness: Which answer is kinder}\n")
    common = ["a.jsonl", "b.jsonl", "--backend", "human", "--criterion", "one.yaml", "--out", "j.jsonl"]
    run(tmp_path, *common, "--form", "f.html")
    page = (tmp_path / "f.html").read_text()
    assert "Which answer is kinder" in page
    form = re.search(r'"form": "(\w+)"', page).group(1)
    (tmp_path / "ann.json").write_text(json.dumps({"form": form, "person": "Ann", "answers": {"c0": "A"}}))
    run(tmp_path, *common, "--answers", "ann.json")
    assert [row["criterion"] for row in rows_of(tmp_path / "j.jsonl")] == ["kindness"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("criteria:\n  x: [", "rubric.yaml:2: not YAML"),
        ("criteria: []", "field 'criteria'"),
        ("questions: {accuracy: Which is it}", "field 'criteria'"),
        ("criteria: {accuracy: Which is it}\nnoun: x", "field 'noun': unknown"),
        ("criteria: {accuracy: }", "criterion 'accuracy': expected its question"),
        ("criteria: {a: Which is it}", "criterion 'a': expected a name"),
        ("criteria: {tie: Which is it}", "criterion 'tie': expected a name"),
        ("criteria: {1: Which is it}", "criterion '1': expected a name"),
        ("criteria: {good style: Which is it, Good-Style: Which}", "criterion 'Good-Style': another one"),
        ("criteria: {accuracy: 'Is {a} better?'}", "{a} in its question"),
        ("criteria: {accuracy: Which is it}\nprompt_noun: 3", "field 'prompt_noun'"),
    ],
)
def test_mistakes_in_a_rubric(tmp_path, text, said):
    path = tmp_path / "rubric.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as e:
        load_criterion(str(path))
    assert said in e.value.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "human", "--form", "f.html"], "people are asked one question"),
        (["--backend", "scorer", "--scorer", "python:s.py:f"], "a scorer has one score"),
        (["--model", "m", "--prompt-noun", "x"], "--prompt-noun has no effect"),
        (["--model", "m", "--check"], "--check takes one criterion"),
    ],
)
def test_where_a_rubric_is_refused(tmp_path, rubric, options, said):
    candidates(tmp_path, 2)
    (tmp_path / "s.py").write_text("def f(rows):\n    return [0.0 for row in rows]\n")
    files = ["a.jsonl"] if "--check" in options else ["a.jsonl", "b.jsonl"]
    _, err = run(tmp_path, *files, *rubric, *options, "--out", "j.jsonl", code=2)
    assert said in err and not list(tmp_path.glob("j.jsonl*"))


def test_the_plan_tells_requests(tmp_path, rubric):
    candidates(tmp_path, 4)
    out, _ = run(tmp_path, "a.jsonl", "b.jsonl", "--model", "m", *rubric, "--out", "j.jsonl", "--dry-run", "--json")
    assert {"judgements": 8, "criteria of each": 3}.items() <= json.loads(out).items()
