"""judge --scale: each completion alone gets a score of 1 to 10, read strictly; means by prompt, two files paired."""

import json
import re

import numpy as np
import pytest

from dpoctl.judging import statistics
from dpoctl.judging.grading import _QUESTIONS, NO_SCORE, OUTSIDE, UNCLEAR_SCORE, load_scale, read_score
from dpoctl.judging.prompts import CRITERIA
from dpoctl.judging.verdicts import CUT_THOUGHT
from dpoctl.reports.collect import collect
from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import manifest, rows_of, run, write

pytestmark = pytest.mark.usefixtures("warm_judge")

READ = [
    ("Score: 7", 7),
    ("score: 1", 1),
    ("SCORE : 10", 10),
    ("Score: 7/10", 7),
    ("Score: 7 / 10.", 7),
    ("Score: 7 out of 10", 7),
    ("Score: 10/10", 10),
    ("Score: 7.0", 7),
    ("Score: 7.", 7),
    ("Score: 7 points", 7),
    ("Score: [[7]]", 7),
    ("Rating: [[7]]", 7),
    ("[[7]]", 7),
    ("**Score:** 7", 7),
    ("**Score: 7/10**", 7),
    ("### Final score: **8**", 8),
    ("The score is 6", 6),
    ("Grade: 4", 4),
    (r"Score: \boxed{9}", 9),
    (r"Score: $\boxed{9}$", 9),
    ("Score: <7>", 7),
    ("Score: 7 (clear and kind)", 7),
    ("Score: 7 - it is clear", 7),
    ("Score: 7, since it is clear", 7),
    ("Score: 7/10 because it is clear", 7),
    ("Score:\n7", 7),
    ("**Score:**\n\n**7**", 7),
    ('{"score": 7}', 7),
    ("Score\uff1a\uff17", 7),
    ("It is clear. Score: 7", 7),
    ("Score: 3\nOn second thoughts:\nScore: 5", 5),
    ("<think>\nScore: 3\n</think>\nScore: 5", 5),
    ("Score: 70/100", UNCLEAR_SCORE),
    ("Score: 7/100", UNCLEAR_SCORE),
    ("Score: 7/5", UNCLEAR_SCORE),
    ("Score: 7 out of 8", UNCLEAR_SCORE),
    ("Score: 7.5", UNCLEAR_SCORE),
    ("Score: 7.05", UNCLEAR_SCORE),
    ("Score: 7,5", UNCLEAR_SCORE),
    ("Score: 7.5/10", UNCLEAR_SCORE),
    ("Score: 7/10.5", UNCLEAR_SCORE),
    ("Score: 7-8", UNCLEAR_SCORE),
    ("Score: 7 - 8", UNCLEAR_SCORE),
    ("Score: 7 or 8", UNCLEAR_SCORE),
    ("Score: 7 (or 8)", UNCLEAR_SCORE),
    ("Score: 7 to 8", UNCLEAR_SCORE),
    ("Score: 7?", UNCLEAR_SCORE),
    ("Score: 7+", UNCLEAR_SCORE),
    ("Score: -7", UNCLEAR_SCORE),
    ("Score: ~7", 7),
    ("Score: about 7", UNCLEAR_SCORE),
    ("Score: 70%", UNCLEAR_SCORE),
    ("Score: 7%", UNCLEAR_SCORE),
    ("Score: 7th", UNCLEAR_SCORE),
    ("Score: 07", UNCLEAR_SCORE),
    ("Score: 1e1", UNCLEAR_SCORE),
    ("Score: seven", UNCLEAR_SCORE),
    ("Score: 7 stars of 8", UNCLEAR_SCORE),
    ("Score: <1 to 10>", UNCLEAR_SCORE),
    ("Score: " + "9" * 6000, UNCLEAR_SCORE),
    ("Score: 11", OUTSIDE),
    ("Score: 11/10", OUTSIDE),
    ("Score: 0", OUTSIDE),
    ("Score: 70", OUTSIDE),
    ("7", NO_SCORE),
    ("I would give it 7/10.", NO_SCORE),
    ("Underscore: 7", NO_SCORE),
    ("", NO_SCORE),
    ("<think>\nScore: 3", CUT_THOUGHT),
]


@pytest.mark.parametrize(("answer", "expected"), READ)
def test_the_forms_of_a_score(answer, expected):
    for before in ("", "It is clear, but too long: 3 paragraphs.\n\n"):
        read = read_score(before + answer)
        assert (int(read.choice) if read.choice else read.reason) == expected
    if isinstance(expected, int) and answer.startswith("Score: "):
        assert read_score(answer.replace("Score:", "Score (good style):"), "good style").choice == str(expected)
        assert read_score(answer, "good style").reason == NO_SCORE


def samples(folder, name: str, n: int, grade, per_prompt: int = 1) -> str:
    """A completions file whose texts say which grade they are worth."""
    rows = [
        {"prompt_id": f"p{i}", "prompt": f"Question {i}?", "completion": f"worth {grade(i, k)} points", "k": k}
        for i in range(n)
        for k in range(per_prompt)
    ]
    return write(folder / f"{name}.jsonl", [row | {"finish": "stop"} for row in rows])


def graded(text: str) -> str:
    return text.split("\nCandidate (")[1].split("\n")[2]


def worth(text: str) -> str:
    return f"It is clear.\nScore: {re.search(r'worth (-?[0-9]+)', graded(text)).group(1)}"


@pytest.fixture
def judge(tmp_path):
    """A function that grades files by a server and returns (stdout, stderr)."""

    def ask(server, *args, out="j.jsonl", code=0):
        at = ["--scale", "--model", "m", "--base-url", server.url, "--retries", "0"]
        return run(tmp_path, *args, *at, "--out", out, code=code)

    return ask


def test_two_files_are_graded_and_compared_by_prompt(tmp_path, judge):
    """Intervals resample prompts, whose samples are correlated; the difference is paired by prompt."""
    a = samples(tmp_path, "a", 20, lambda i, k: 4 + i % 5, per_prompt=2)
    b = samples(tmp_path, "b", 20, lambda i, k: 3 + i % 5)
    with JudgeServer(worth) as server:
        out, err = judge(server, a, b)
    rows = rows_of(tmp_path / "j.jsonl")
    assert [row["of"] for row in rows] == ["a"] * 40 + ["b"] * 20
    assert rows[0] == {
        **{"prompt_id": "p0", "k": 0, "prompt": "Question 0?", "completion": "worth 4 points", "grade": 4},
        **{"criterion": "helpful", "temperature": None, "judge": "m", "raw": "It is clear.\nScore: 4", "of": "a"},
    }
    found = manifest(tmp_path)["metrics"]
    assert found["graded"] == 60
    one, other = found["grades"]["a"], found["grades"]["b"]
    assert (one["n"], one["mean"], other["mean"]) == (40, 6.0, 5.0)
    assert one["counts"] == {str(grade): 8 for grade in range(4, 9)}
    grades = [row["grade"] for row in rows[:40]]
    assert one["interval"] == list(statistics.bootstrap(grades, [row["prompt_id"] for row in rows[:40]]))
    half = 1.96 * np.std([4 + i % 5 for i in range(20)]) / 20**0.5  # of 20 prompts, not of 40 grades
    assert one["interval"][1] - one["mean"] == pytest.approx(half, rel=0.1)
    assert {"difference": 1.0, "low": 1.0, "high": 1.0, "n": 20}.items() <= found["difference"].items()
    assert "a less b: +1.00 (+1.00 to +1.00)" in err and "6.00" in out and "8 x 4" in out


def test_invalid_grades_have_reasons(tmp_path, judge):
    a = samples(tmp_path, "a", 6, lambda i, k: (5, 11, 0, 7, 8, 9)[i])

    def decide(text):
        if "Question 3?" in text:
            return choice("Score: 7", finish="length")
        if "Question 4?" in text:
            return Special(400, {"error": {"message": "filtered", "code": "content_filter"}})
        return "I like it." if "Question 5?" in text else worth(text)

    with JudgeServer(decide) as server:
        _, err = judge(server, a)
    rows = rows_of(tmp_path / "j.jsonl")
    assert [row["grade"] for row in rows] == [5, None, None, None, None, None]
    assert [row.get("reason") for row in rows] == [
        *(None, OUTSIDE, OUTSIDE, "cut at the token limit", "content filter", NO_SCORE)
    ]
    summary = manifest(tmp_path)["metrics"]["grades"]["a"]
    assert summary["n"] == 1 and summary["invalid"] == pytest.approx(5 / 6)
    assert summary["invalid_reasons"][OUTSIDE] == 2 and f"2 {OUTSIDE}" in err


def test_without_a_valid_grade_there_is_no_mean(tmp_path, judge):
    a = samples(tmp_path, "a", 2, lambda i, k: 70)
    with JudgeServer(worth) as server:
        judge(server, a)
    summary = manifest(tmp_path)["metrics"]["grades"]["a"]
    assert (summary["n"], summary["mean"], summary["interval"]) == (0, None, None)


def test_cache_canary_and_resume(tmp_path, judge):
    """A rerun asks only for what failed; answers are cached; the canary is graded once a prompt, apart."""
    a = samples(tmp_path, "a", 70, lambda i, k: 8)
    down = {"now": True}

    def decide(text):
        if down["now"] and "Question 69?" in text and "worth" in text:
            return Special(503, {"error": {"message": "busy"}})
        return "Score: 2" if "As an AI" in graded(text) else worth(text)

    with JudgeServer(decide) as server:
        _, err = judge(server, a, "--canary", "As an AI I cannot.", code=75)
        assert "1 judgements are pending" in err
        down["now"], before = False, server.requests
        judge(server, a, "--canary", "As an AI I cannot.")
        assert server.requests == before + 1
        judge(server, a, out="again.jsonl")
        assert server.requests == before + 1
    found = manifest(tmp_path)["metrics"]
    assert found["grades"]["a"]["mean"] == 8 and found["grades"]["a"]["n"] == 70
    assert found["canary"]["mean"] == 2 and found["canary"]["n"] == 70


def test_a_rubric_gives_a_grade_for_each_criterion(tmp_path, judge):
    a = samples(tmp_path, "a", 3, lambda i, k: 5)
    (tmp_path / "r.yaml").write_text(
        "criteria:\n  accuracy: How accurate is it?\n  good style: How well is it written?\n"
    )

    def decide(text):
        assert text.endswith("Score (accuracy): <1 to 10>\nScore (good style): <1 to 10>")
        return "Score (accuracy): 9/10\nScore (good style): " + ("11" if "Question 2?" in text else "3")

    with JudgeServer(decide) as server:
        out, _ = judge(server, a, "--criterion", "r.yaml")
        assert server.requests == 3
    found = manifest(tmp_path)["metrics"]["by_criterion"]
    assert found["accuracy"]["grades"]["a"]["mean"] == 9 and found["good style"]["grades"]["a"]["mean"] == 3
    assert found["good style"]["grades"]["a"]["n"] == 2 and "criterion accuracy" in out
    shown = collect((str(tmp_path / "j.jsonl"),)).graded
    assert [(g.name, g.criterion, g.summary["n"]) for g in shown] == [("a", "accuracy", 3), ("a", "good style", 2)]


def test_grades_in_a_report_and_as_scores_of_samples(tmp_path, judge):
    """The report has a table; make-prefs takes the grades as scores, and does not take them as judgements."""
    a = samples(tmp_path, "samples.dpo", 4, lambda i, k: 4 + 3 * k, per_prompt=2)
    with JudgeServer(worth) as server:
        judge(server, a, "--limit", "6")
    out, _ = run(tmp_path, "j.jsonl", "--out", "report", stage="report")
    assert "Grades" in out and "dpo" in out
    assert "Each completion alone was given a score" in (tmp_path / "report" / "report.html").read_text()
    run(tmp_path, "--samples", "j.jsonl", "--columns", "score=grade", "--out", "p.jsonl", stage="make-prefs")
    pairs = rows_of(tmp_path / "p.jsonl")
    assert len(pairs) == 3 and {(p["chosen"], p["margin"]) for p in pairs} == {("worth 7 points", 3)}
    _, err = run(tmp_path, "--judgements", "j.jsonl", "--out", "q.jsonl", stage="make-prefs", code=2)
    assert "j.jsonl:1: field 'a'" in err


def test_shards_of_grades_are_merged(tmp_path, judge):
    a = samples(tmp_path, "a", 70, lambda i, k: 1 + i % 10)
    with JudgeServer(worth) as server:
        for n in (1, 2):
            judge(server, a, "--shard", f"{n}/2", out=f"part-{n}.jsonl")
        judge(server, a)
    out, _ = run(tmp_path, "part-1.jsonl", "part-2.jsonl", "--out", "joined.jsonl", stage="merge")
    assert (tmp_path / "joined.jsonl").read_bytes() == (tmp_path / "j.jsonl").read_bytes() and "5.50" in out
    joined = json.loads((tmp_path / "joined.jsonl.manifest.json").read_text())["metrics"]
    assert joined == manifest(tmp_path)["metrics"]


def test_what_is_asked(tmp_path):
    assert _QUESTIONS.keys() == CRITERIA.keys()
    for name in CRITERIA:
        text = load_scale(name, "letter" if name == "helpful" else None).request("the {a}", "one {b}", "", "key")
        assert not re.search(r"\{(?!a\}|b\})", text) and "one {b}" in text and text.endswith("Score: <1 to 10>")
    assert "in this letter?" in load_scale("helpful", "letter").request("p", "c", "", "k")
    (tmp_path / "t.txt").write_text("{fence}{prompt}|{completion}")
    assert load_scale(str(tmp_path / "t.txt")).request("p", "c", "", "k").endswith(">>>p|c")


def test_what_it_costs(tmp_path):
    a = samples(tmp_path, "a", 4, lambda i, k: 5)
    more = ["--model", "m", "--price-in", "1", "--price-out", "1", "--out", "j.jsonl", "--dry-run", "--json"]
    plan = json.loads(run(tmp_path, a, "--scale", *more)[0])
    assert {"samples": 4, "judgements": 4}.items() <= plan.items() and plan["prompt tokens, about"] > 400


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--order", "random"], "--order has no effect"),
        (["--within"], "--within has no effect"),
        (["--check"], "--scale has no effect with --check"),
        (["--compare", "a.jsonl"], "--compare has no effect"),
        (["--against", "a.jsonl"], "--against has no effect"),
        (["--backend", "scorer", "--scorer", "python:s.py:f"], "--scale has no effect"),
        (["--backend", "human", "--form", "f.html"], "--scale has no effect"),
        (["--criterion", "t.txt"], "the template has no {completion}"),
        (["--criterion", "helpfull"], "neither a file nor one of"),
    ],
)
def test_mistakes(tmp_path, options, said):
    a = samples(tmp_path, "a", 2, lambda i, k: 5)
    (tmp_path / "t.txt").write_text("{prompt} {a} {b}")
    server = [] if "--backend" in options else ["--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    _, err = run(tmp_path, a, "--scale", *options, *server, "--out", "j.jsonl", code=2)
    assert said in err and err.count("error:") == 1
