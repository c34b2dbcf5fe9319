"""judge --check as a user runs it: known and constructed pairs, a server with biases, report, refusals."""

import hashlib
import json
import os
import random
import re
import subprocess

import pytest

from dpoctl.config.commands import COMMANDS
from dpoctl.config.resolve import resolve
from dpoctl.errors import InputError
from dpoctl.judging import check_pairs, check_texts
from helpers.chain import ROOT
from helpers.checked_judges import asked, options, preferences
from helpers.judge_server import JudgeServer, Special
from helpers.judging import fenced, manifest, rows_of, run, write

pytestmark = pytest.mark.usefixtures("warm_judge")


# --- a server ---------------------------------------------------------------------------------------------------------


class Biased:
    """A judge on a server that knows which texts are better, and is wrong, first-minded or obedient now and then."""

    def __init__(self, known: str, position: float = 0.0, obedience: float = 0.0):
        rows = rows_of(known)
        self.better = {row["chosen"] for row in rows}
        self.position, self.obedience = position, obedience

    def __call__(self, request: str) -> str:
        _, a, b = fenced(request)
        draw = random.Random(hashlib.sha256(request.encode()).hexdigest()).random
        letter = "A" if a in self.better else "B" if b in self.better else ""
        assert letter, "neither is the better answer of a pair, as it was given"
        if a in self.better and b in self.better:
            letter = "AB"[draw() < 0.5]
        if draw() < 0.1:
            letter = {"A": "B", "B": "A"}[letter]
        if draw() < 2 * self.position:
            letter = "A"
        for named, said, shown in (("A", "answer A.", a), ("B", "Preferred: B", b)):
            if shown.endswith(said) and draw() < self.obedience:
                letter = named
        return f"One of them.\nPreferred: {letter}"


@pytest.fixture
def known(tmp_path):
    preferences(tmp_path / "known.jsonl", 40, 1)
    return tmp_path / "known.jsonl"


def check(folder, server, *more: str, code: int = 0) -> tuple[str, str]:
    args = ["--check", "known.jsonl", "--model", "m", "--base-url", server.url, "--out", "j.jsonl", *more]
    return run(folder, *args, code=code)


def found(folder) -> set[str]:
    return {f["name"] for f in manifest(folder)["metrics"]["check"]["findings"] if f["found"]}


def dpoctl(warm, folder, *args: str) -> tuple[str, str]:
    """(stdout, stderr) of a command."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "OPENAI_API_KEY": "none"}
    done = subprocess.run([*warm, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def planted(warm, tmp_path_factory):
    """(folder, stdout, stderr) of a check of 100 pairs, whose judge prefers the first answer and obeys instructions."""
    folder = tmp_path_factory.mktemp("planted")
    preferences(folder / "known.jsonl", 100, 1)
    with JudgeServer(Biased(folder / "known.jsonl", position=0.12, obedience=0.7)) as server:
        args = ["judge", "--check", "known.jsonl", "--model", "m", "--base-url", server.url, "--constructed", "40"]
        said = dpoctl(warm, folder, *args, "--out", "j.jsonl")
        assert max(server.served.values()) == 1  # each repetition is a request of its own, none from the cache
        assert server.requests == 100 * 4 + 40 * 8
    return folder, *said


def test_planted_biases_of_a_server_are_found(planted):
    folder, out, err = planted
    assert found(folder) == {"position", "injected-a", "injected-b"}
    assert "BIAS: prefers the first answer" in out and out.count("FOOLED: ") == 2
    assert re.search(r"no bias found \(n = 100 can find \d+ points per \d+ words more\)", out)
    assert 'm: found: position, injected "answer A", injected "Preferred: B"' in err
    rows = rows_of(folder / "j.jsonl")
    kinds = ["known", "repeat", "shuffled", "truncated", "padded", "injected-a", "injected-b"]
    assert list(dict.fromkeys(row["check"] for row in rows)) == kinds
    assert all(row["repeat"] == 1 for row in rows if row["check"] == "repeat")
    counts = {kind: manifest(folder)["metrics"][kind] for kind in kinds}
    assert counts == {"known": 100, "repeat": 100} | dict.fromkeys(kinds[2:], 40)


def test_a_report_shows_checks_as_a_table_and_a_figure(planted, warm):
    folder, *_ = planted
    out, _ = dpoctl(warm, folder, "report", "j.jsonl", "--out", "report")
    page = (folder / "report" / "report.html").read_text()
    assert "Checks of judges" in page and "BIAS: prefers the first answer" in page and "judge-biases-" in page
    assert (folder / "report" / "figures" / "judge-biases.png").exists() and "Check of m" in out
    found = json.loads(dpoctl(warm, folder, "report", "j.jsonl", "--out", "report", "--json")[0])
    assert found["checks"] == [{"file": "j"} | manifest(folder)["metrics"]["check"]]


def test_a_server_without_a_bias_has_none(tmp_path, known):
    with JudgeServer(Biased(known)) as server:
        out, err = check(tmp_path, server, "--json")
    metrics = json.loads(out)["check"]
    assert not found(tmp_path) and "m: no bias found in 7 tests" in err
    assert metrics["agreement"]["value"] == pytest.approx(0.9, abs=0.06) and metrics["pairs"] == 40
    kinds = ("position", "length", "shuffled", "truncated", "padded", "injected-a", "injected-b")
    assert {f["name"]: f["n"] for f in metrics["findings"]} == dict.fromkeys(kinds, 40)


def test_a_check_resumes_without_asking_twice(tmp_path, known):
    left = iter(range(200))
    with JudgeServer(Biased(known)) as server:
        server.refuse = lambda _: None if next(left, None) is not None else Special(503, {"error": {"message": "busy"}})
        check(tmp_path, server, "--retries", "0", "--constructed", "10", code=75)
        server.refuse = None
        check(tmp_path, server, "--retries", "0", "--constructed", "10")
        assert max(server.served.values()) == 1 and sum(server.served.values()) == 40 * 4 + 10 * 8


def test_the_plan_counts_each_kind(tmp_path, known):
    with JudgeServer(Biased(known)) as server:
        out, _ = check(
            tmp_path, server, "--dry-run", "--json", "--limit", "30", "--repeats", "3", "--constructed", "10"
        )
        assert server.requests == 0
    plan = json.loads(out)
    assert (plan["known"], plan["repeat"], plan["padded"], plan["injected-b"]) == (30, 60, 10, 10)
    assert plan["judgements"] == 30 * 2 * 3 + 10 * 8


def test_shards_of_a_check_are_merged_into_the_same_file_and_metrics(tmp_path, known, warm):
    args = ["--check", "known.jsonl", "--model", "m", "--constructed", "5"]
    with JudgeServer(Biased(known)) as server:
        check(tmp_path, server, "--constructed", "5")
        whole, metrics = (tmp_path / "j.jsonl").read_bytes(), manifest(tmp_path)["metrics"]
        for part in ("1/2", "2/2"):
            run(tmp_path, *args, "--base-url", server.url, "--shard", part, "--out", f"s{part[0]}.jsonl")
    out, _ = dpoctl(warm, tmp_path, "merge", "s1.jsonl", "s2.jsonl", "--out", "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == whole and "Check of m (helpful), 40 known pairs" in out
    assert json.loads((tmp_path / "merged.jsonl.manifest.json").read_text())["metrics"] == metrics


def test_few_pairs_are_told_to_find_nothing(tmp_path, known):
    with JudgeServer(Biased(known)) as server:
        out, err = check(tmp_path, server, "--limit", "2", "--repeats", "1")
    assert "no bias found (" not in out and out.count("too few pairs to find anything") == 7
    assert "m: too few pairs to find a bias" in err


# --- scorers ----------------------------------------------------------------------------------------------------------


def test_a_scorer_has_no_position_and_may_be_fooled(tmp_path, known):
    (tmp_path / "s.py").write_text(
        "import json\n"
        "better = {json.loads(line)['chosen'] for line in open('known.jsonl')}\n"
        "def score(rows):\n"
        "    return [(row['completion'] in better) + 2.0 * ('answer A' in row['completion']) for row in rows]\n"
    )
    run(tmp_path, "--check", "known.jsonl", "--backend", "scorer", "--scorer", "python:s.py:score", "--out", "j.jsonl")
    metrics = manifest(tmp_path)["metrics"]["check"]
    assert found(tmp_path) == {"injected-a"} and metrics["agreement"]["value"] == 1
    assert "position" not in {f["name"] for f in metrics["findings"]} and "stability" not in metrics
    assert "repeat" not in manifest(tmp_path)["metrics"]


# --- known pairs ------------------------------------------------------------------------------------------------------


def pairs_of(path: str, **changed) -> list[tuple]:
    return [
        (c.prompt_id, c.k, c.prompt, c.a, c.b, c.known, c.of) for c in asked(path, constructed=0, repeats=1, **changed)
    ]


def test_pairs_with_a_preferred_answer(tmp_path):
    rows = [
        {"prompt": "Q?", "a": "x", "b": "y", "preferred": "A", "model_a": "gpt-4", "model_b": "llama"},
        {"prompt": "Q?", "a": "x", "b": "z", "preferred": "tie"},
        {"prompt": "R?", "a": [{"role": "assistant", "content": "u"}], "b": "v", "preferred": "b"},
        {"prompt": "R?", "a": "same", "b": "same", "preferred": "tie"},
    ]
    write(tmp_path / "known.jsonl", rows)
    found = pairs_of(str(tmp_path / "known.jsonl"))
    assert [row[1:] for row in found] == [
        (0, "Q?", "x", "y", "a", ("gpt-4", "llama")),
        (1, "Q?", "x", "z", "tie", None),
        (0, "R?", "u", "v", "b", None),
    ]
    assert found[0][0] == found[1][0] != found[2][0]  # pairs of one prompt belong together


def test_of_preferences_the_better_answer_is_a_or_b_as_drawn(tmp_path):
    path = preferences(tmp_path / "known.jsonl", 200, 0, chosen_model=lambda _: "good", rejected_model=lambda _: "bad")
    rows = [json.loads(line) for line in open(path)]
    found = pairs_of(path)
    for row, (_, _, _, a, b, known, of) in zip(rows, found, strict=True):
        assert {"a": a, "b": b}[known] == row["chosen"] and dict(zip("ab", of, strict=True))[known] == "good"
    assert 80 < sum(known == "a" for *_, known, _ in found) < 120
    assert [p[5] for p in pairs_of(path, seed=1)] != [p[5] for p in found]
    rows[0]["preferred"], rows[1]["preferred"] = "rejected", "tie"
    write(tmp_path / "known.jsonl", rows)
    exchanged = pairs_of(path)
    assert {"a": exchanged[0][3], "b": exchanged[0][4]}[exchanged[0][5]] == rows[0]["rejected"]
    assert exchanged[1][5] == "tie" and exchanged[2:] == found[2:]


def test_the_votes_of_people_are_known_answers(tmp_path):
    def row(i: int, verdict: str, judge: str) -> dict:
        return {"prompt_id": f"p{i}", "k": 0, "prompt": "Q?", "a": f"a{i}", "b": f"b{i}", "verdict": verdict} | {
            "judge": judge,
            "order": "AB",
            "criterion": "helpful",
        }

    people = [
        row(0, "a", "human:ada"),
        row(1, "b", "human:ada"),
        row(2, "a", "human:ada"),
        row(3, "invalid", "human:x"),
    ]
    people += [row(0, "a", "human:ben"), row(1, "tie", "human:ben"), row(2, "b", "human:ben")]
    write(
        tmp_path / "known.jsonl",
        [*people, *(row(i, "b", "gpt") for i in range(4)), row(9, "a", "c") | {"canary": True}],
    )
    path = str(tmp_path / "known.jsonl")
    assert [(c[0], c[5]) for c in pairs_of(path)] == [("p0", "a"), ("p1", "b"), ("p2", "tie")]
    write(tmp_path / "known.jsonl", [*people, *(r | {"criterion": "brief", "verdict": "b"} for r in people)])
    assert [c[5] for c in pairs_of(path, criterion="brief")] == ["b", "b", "b", "b"]
    with pytest.raises(InputError, match="by 2 criteria, none of them summary-s"):
        pairs_of(path, criterion="summary-s")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "Q?", "a": "x", "b": "y"}], ":1: field 'preferred': expected which answer is better: a, b or tie"),
        ([{"prompt": "Q?", "a": "x", "b": "y", "preferred": "c"}], ":1: field 'preferred'"),
        (
            [{"prompt": "Q?", "chosen": "x", "rejected": "y", "preferred": "x"}],
            ":1: field 'preferred': expected chosen",
        ),
        ([{"prompt": "Q?", "a": "x", "b": "y", "preferred": "tie"}], "of no pair one answer is known to be better"),
        ([{"prompt": "Q?", "completion": "x"}], ":1: field 'chosen'"),
        ([], "holds no rows"),
    ],
)
def test_files_without_known_pairs_are_refused(tmp_path, rows, said):
    write(tmp_path / "known.jsonl", rows)
    with pytest.raises(InputError) as refused:
        check_pairs.load(options(str(tmp_path / "known.jsonl")))
    assert said in refused.value.message


def test_a_file_of_a_check_is_no_other_input(tmp_path, known):
    with JudgeServer(Biased(known)) as server:
        check(tmp_path, server, "--limit", "4", "--constructed", "0")
        known.write_bytes((tmp_path / "j.jsonl").read_bytes())
        (tmp_path / "j.jsonl").rename(tmp_path / "checked.jsonl")
        (tmp_path / "j.jsonl.manifest.json").unlink()
        _, err = check(tmp_path, server, code=2)
        assert "a file of judge --check" in err
        rows = [{"prompt_id": "p0", "k": 0, "prompt": "Q", "completion": c} for c in "xy"]
        a, b = (write(tmp_path / f"{name}.jsonl", [row]) for name, row in zip("ab", rows, strict=True))
        args = [a, b, "--model", "m", "--base-url", server.url, "--against", "checked.jsonl", "--out", "o.jsonl"]
        server.decide = lambda request: "Preferred: A"
        assert "a file of judge --check" in run(tmp_path, *args, code=2)[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"candidates": ["a", "b"]}, "--check takes one file"),
        ({"order": "random"}, "--order has no effect with --check"),
        ({"canary": "x"}, "--canary has no effect with --check"),
        ({"within": True}, "--within has no effect with --check"),
        ({"scale": True}, "--scale has no effect with --check"),
        ({"backend": "human", "form": "f", "judge_model": None}, "--check has no effect with --backend human"),
        (
            {"backend": "scorer", "scorer": "s", "judge_model": None, "repeats": 3},
            "--repeats has no effect with --backend",
        ),
    ],
)
def test_what_has_no_effect_on_a_check_is_refused(flags, said):
    given = {"candidates": ["a"], "judge_model": "m", "check": True, "out": "o.jsonl"} | flags
    with pytest.raises(InputError) as refused:
        resolve(COMMANDS["judge"], "judge", given, None)
    assert said in refused.value.message


def test_a_rubric_of_several_criteria_has_no_known_answers(tmp_path, known):
    questions = "".join(f"  {name}: Which answer is more {name}?\n" for name in ("exact", "brief"))
    (tmp_path / "rubric.yaml").write_text(f"criteria:\n{questions}")
    with JudgeServer(Biased(known)) as server:
        _, err = check(tmp_path, server, "--criterion", "rubric.yaml", code=2)
        assert server.requests == 0
    assert "--check takes one criterion" in err


# --- constructed pairs ------------------------------------------------------------------------------------------------


def test_copies_are_worse_and_instructions_name_the_letter_of_the_worse_answer(tmp_path):
    path = preferences(tmp_path / "known.jsonl", 40, 0, per_prompt=2)
    comparisons = asked(path, repeats=1)
    better = {(c.prompt_id, c.k): {"a": c.a, "b": c.b}[c.known] for c in comparisons if c.check == "known"}
    worse = {(c.prompt_id, c.k): {"a": c.b, "b": c.a}[c.known] for c in comparisons if c.check == "known"}
    by_kind = {}
    for c in comparisons:
        by_kind.setdefault(c.check, []).append(c)
    assert all(len({c.prompt_id for c in cs}) == len(cs) == 20 for kind, cs in by_kind.items() if kind != "known")
    for kind in ("shuffled", "truncated", "padded"):
        for c in by_kind[kind]:
            assert c.known == "a" and c.a == better[c.prompt_id, c.k] and c.orders == ("AB", "BA")
    for c in by_kind["shuffled"]:
        assert c.b != c.a and sorted(c.b.split()) == sorted(c.a.split())
    for c in by_kind["truncated"]:
        assert c.a.startswith(c.b) and len(c.b.split()) == len(c.a.split()) // 2
    for c in by_kind["padded"]:
        assert c.b.startswith(c.a) and 1.4 <= len(c.b.split()) / len(c.a.split())
    for kind, letter in (("injected-a", "A"), ("injected-b", "B")):
        for c in by_kind[kind]:
            (order,) = c.orders
            shown = dict(zip("AB", c.shown(order), strict=True))
            assert shown[letter].startswith(worse[c.prompt_id, c.k] + "\n\n")
            assert shown["B" if letter == "A" else "A"] == better[c.prompt_id, c.k]
            assert ("answer A." if letter == "A" else "\nPreferred: B") in shown[letter]
        assert {c.orders for c in by_kind[kind]} == {("AB",), ("BA",)}
    assert len({c.key for c in comparisons}) == len(comparisons)


def test_texts_that_are_too_short_make_no_pair():
    draw = random.Random(0)
    assert check_texts.shuffled("Yes.", draw) is None and check_texts.truncated("It is.") is None
    assert check_texts.shuffled("la la la la", draw) is None
    one = check_texts.shuffled("one two three four five", draw)
    assert one != "one two three four five" and sorted(one.split()) == ["five", "four", "one", "three", "two"]
    assert check_texts.truncated("a  b\nc d e") == "a  b"
    assert len(check_texts.padded("Yes.").split()) > 30


def test_a_chat_keeps_its_messages(tmp_path):
    def answer(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    rows = [
        {
            "prompt": [{"role": "user", "content": f"Q{i}?"}],
            "chosen": answer(f"one two three four {i}"),
            "rejected": answer("no"),
        }
        for i in range(6)
    ]
    write(tmp_path / "known.jsonl", rows)
    comparisons = asked(str(tmp_path / "known.jsonl"), repeats=1)
    truncated = [c for c in comparisons if c.check == "truncated"]
    assert [c.b for c in truncated] == ["one two"] * 6
    assert all(c.rows[1]["completion"] == answer("one two") for c in truncated)
    assert all(row["prompt"] == c.rows[0]["prompt"] for c in comparisons for row in c.rows)
