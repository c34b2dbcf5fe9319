"""A judge's probabilities against people's answers, in the report, in comparisons, and as labels of preferences."""

import json
import math

import pytest

from dpoctl.reports import figures, tables
from dpoctl.reports.collect import collect
from helpers.judge_server import JudgeServer
from helpers.judging import candidates, fenced, judged, manifest, rows_of, run, write
from helpers.logprobs import sure_of_a

pytestmark = pytest.mark.usefixtures("warm_judge")

SOFT = ("--verdict", "logprobs")


def number(text: str) -> int:
    return int(text.split("Question ")[1].split("?")[0])


def by_question(text: str):
    """p is .8 for the candidate that holds the word, of every fourth question .55."""
    p = 0.55 if number(text) % 4 == 0 else 0.8
    return sure_of_a(p if "good" in fenced(text)[1] else 1 - p)


def known(folder, wins, **more) -> str:
    """Judgements of a person: `a` where `wins(i)`."""
    row = {"k": 0, "judge": "human:Ada", "criterion": "helpful", "a": "x", "b": "y", "prompt": "Q"} | more
    return write(
        folder / "known.jsonl",
        [row | {"prompt_id": f"p{i}", "verdict": "a" if wins(i) else "b"} for i in range(40)],
    )


def test_calibration_against_people(tmp_path):
    """Of the 30 at .8 people agree with 24 and of the 10 at .55 with 5; .55 is a win, though barely."""
    candidates(tmp_path, 40)
    name = known(tmp_path, lambda i: i % 8 != 0 if i % 4 == 0 else i % 5 != 0)
    with JudgeServer(by_question) as server:
        err = judged(tmp_path, server, *SOFT, "--against", name)
    found = manifest(tmp_path)["metrics"]["calibration"]
    assert found["bins"] == [[pytest.approx(0.55), 0.5, 10], [pytest.approx(0.8), 0.8, 30]]
    assert found["n"] == 40 and found["error"] == pytest.approx(0.05 / 4)
    expected = (5 * 0.45**2 + 5 * 0.55**2 + 24 * 0.2**2 + 6 * 0.8**2) / 40
    assert found["brier"] == pytest.approx(expected)
    assert f"Brier score {expected:.3f}, error 0.013 over 40 comparisons" in err and "kappa" in err

    collected = collect([str(tmp_path / "j.jsonl")])
    [drawing] = [d for d in figures.drawings(collected) if d and d.name == "judge-calibration"]
    [line] = drawing.figure.axes[0].containers
    assert line.lines[0].get_xydata().tolist() == [pytest.approx([0.55, 0.5]), pytest.approx([0.8, 0.8])]
    assert line.get_label() == f"a: Brier {expected:.3f}, error 0.013, 40 comparisons"
    assert tables.numbers(collected)["judge_calibration"][0]["n"] == 40
    run_report(tmp_path)


def run_report(folder) -> None:
    from dpoctl.cli.app import run as command_line

    assert command_line(["report", str(folder / "j.jsonl"), "--out", str(folder / "report")]) == 0
    assert "Calibration of the judge" in (folder / "report" / "report.html").read_text()


def test_verdicts_have_no_calibration(tmp_path):
    candidates(tmp_path, 40)
    name = known(tmp_path, lambda i: True)
    with JudgeServer(lambda text: "Preferred: A") as server:
        err = judged(tmp_path, server, "--against", name)
    assert "calibration" not in manifest(tmp_path)["metrics"] and "Brier" not in err
    assert not [
        d for d in figures.drawings(collect([str(tmp_path / "j.jsonl")])) if d and d.name == "judge-calibration"
    ]


@pytest.mark.parametrize("p", [1.5, "x", True])
def test_a_probability_that_is_none(p, tmp_path):
    """In --against, in a report, and as votes: named by file and line."""
    candidates(tmp_path, 2)
    row = {"prompt_id": "p0", "k": 0, "verdict": "a", "judge": "m", "criterion": "c", "a": "x", "b": "y", "prompt": "Q"}
    write(tmp_path / "wrong.jsonl", [row, row | {"p": p}])
    with JudgeServer(by_question) as server:
        err = judged(tmp_path, server, *SOFT, "--against", "wrong.jsonl", code=2)
    kind = "probability from 0 to 1" if p == 1.5 else "finite number"
    assert f"wrong.jsonl:2: field 'p': expected a {kind}" in err
    from dpoctl.errors import InputError

    with pytest.raises(InputError, match="field 'p'"):
        collect([str(tmp_path / "wrong.jsonl")])


def test_comparing_probabilities_with_verdicts_is_said(tmp_path):
    candidates(tmp_path, 40)
    name = known(tmp_path, lambda i: True)
    with JudgeServer(by_question) as server:
        err = judged(tmp_path, server, *SOFT, "--compare", name)
    found = manifest(tmp_path)["metrics"]["compare"]
    assert "one file has probabilities, the other verdicts" in err
    assert found["difference"] == pytest.approx((10 * 0.55 + 30 * 0.8) / 40 - 1)


def test_shards_join_to_the_same(tmp_path):
    """Probabilities travel with the rows, and merge makes the same metrics of them."""
    candidates(tmp_path, 130)
    name = known(tmp_path, lambda i: i % 3 > 0)
    with JudgeServer(by_question) as server:
        judged(tmp_path, server, *SOFT, "--against", name)
        for part in (1, 2):
            out = f"s{part}.jsonl"
            more = ["--model", "m", "--base-url", server.url, "--out", out, "--shard", f"{part}/2", "--against", name]
            run(tmp_path, "a.jsonl", "b.jsonl", *more, *SOFT)
    from dpoctl.cli.app import run as command_line

    shards = [str(tmp_path / f"s{part}.jsonl") for part in (1, 2)]
    assert command_line(["merge", *shards, "--out", str(tmp_path / "joined.jsonl")]) == 0
    assert (tmp_path / "joined.jsonl").read_bytes() == (tmp_path / "j.jsonl").read_bytes()
    joined = json.loads((tmp_path / "joined.jsonl.manifest.json").read_text())["metrics"]
    whole = manifest(tmp_path)["metrics"]
    assert all(joined[name] == whole[name] for name in ("summary", "calibration", "against"))


def test_preferences_have_the_probability_as_share(tmp_path, monkeypatch):
    """Asked by make-prefs, and from judgements: chosen_share is the mean of both orders; near 1/2 the pair is a tie."""
    from dpoctl.cli.app import run as command_line

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log_odds = {"one": 0.0, "two": 0.1, "three": 1.5}
    rows = [
        {"prompt_id": "p", "prompt": "Q", "completion": text, "k": k, "finish": "stop"}
        for k, text in enumerate(log_odds)
    ]
    write(tmp_path / "s.jsonl", rows)

    def decide(text: str):
        _, a, b = fenced(text)
        return sure_of_a(1 / (1 + math.exp(log_odds[b] - log_odds[a] - 0.5)))

    with JudgeServer(decide) as server:
        asked = f"--judge openai --judge-model m --judge-base-url {server.url} --judge-verdict logprobs"
        assert command_line(f"make-prefs --samples s.jsonl {asked} --out p.jsonl".split()) == 0
        given = f"--model m --base-url {server.url} --verdict logprobs"
        assert command_line(f"judge --within s.jsonl {given} --out w.jsonl".split()) == 0
    assert command_line("make-prefs --judgements w.jsonl --samples s.jsonl --out q.jsonl".split()) == 0
    pairs = [
        (row["chosen"], row["rejected"], row["chosen_share"], row["votes"]) for row in rows_of(tmp_path / "p.jsonl")
    ]

    def share(difference: float) -> float:
        return sum(1 / (1 + math.exp(-difference - shift)) for shift in (0.5, -0.5)) / 2

    assert sorted(pairs) == [
        ("three", "one", pytest.approx(share(1.5)), 1),
        ("three", "two", pytest.approx(share(1.4)), 1),
    ]
    assert [row["chosen_share"] for row in rows_of(tmp_path / "q.jsonl")] == pytest.approx([p[2] for p in pairs])
    assert json.loads((tmp_path / "p.jsonl.manifest.json").read_text())["metrics"]["ties"] == 1
