"""judge as a user runs it: a faulty server, costs, retries and resuming, both orders, references, scorers, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpoctl.runtime.http import retry_after_s
from helpers.chain import ROOT
from helpers.judge_server import JudgeServer
from helpers.judging import KEY, candidates, fenced, likes_good, rows_of, run, write

pytestmark = pytest.mark.usefixtures("warm_judge")


@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_comparisons_with_a_faulty_server(tmp_path, count):
    a, b = candidates(tmp_path, count)
    faults = [(0.2, "429"), (0.1, "429-after"), (0.1, "500"), (0.05, "hang"), (0.05, "broken")]

    def decide(text: str) -> str:
        return "I cannot say." if "Question 7?" in text else likes_good(text)

    with JudgeServer(decide, faults) as server:
        out, _ = run(
            tmp_path,
            a,
            b,
            "--model",
            "m",
            "--base-url",
            server.url,
            *"--order random --concurrency 64 --timeout 1 --price-in 1 --price-out 10 --out j.jsonl".split(),
        )
        assert sum(server.served.values()) == count and max(server.served.values()) == 1
        assert all(server.kinds[kind] > count / 50 for _, kind in faults)
        assert server.keys == {f"Bearer {KEY}"}
    judged = rows_of(tmp_path / "j.jsonl")
    assert len(judged) == count
    assert [row["prompt_id"] for row in judged if row["verdict"] == "invalid"] == ["p7"]
    assert all(row["verdict"] == "a" for row in judged if row["prompt_id"] != "p7")
    manifest = json.loads((tmp_path / "j.jsonl.manifest.json").read_text())
    assert manifest["cost"]["dollars"] == pytest.approx(count * (100 * 1 + 10 * 10) / 1e6)
    assert manifest["metrics"]["summary"]["invalid"] == 1 / count and "1.000" in out
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY not in file.read_text(errors="replace")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_permanent_error_is_not_retried(tmp_path, status):
    a, b = candidates(tmp_path, 8)
    with JudgeServer(likes_good, status=status) as server:
        start = time.monotonic()
        _, err = run(tmp_path, a, b, "--model", "m", "--base-url", server.url, "--out", "j.jsonl", code=2)
        assert (
            time.monotonic() - start < 20
            and server.requests <= 8
            and f"refuses the request: {status} " in err
            and err.count("error:") == 1
        )
    assert not (tmp_path / "j.jsonl").exists()


def test_a_killed_run_pays_for_no_answer_twice(tmp_path):
    a, b = candidates(tmp_path, 200)

    def slowly(text: str) -> str:
        time.sleep(0.02)
        return likes_good(text)

    with JudgeServer(slowly) as server:
        args = [a, b, "--model", "m", "--base-url", server.url, "--concurrency", "4", "--out", "j.jsonl"]
        process = run(tmp_path, *args, wait=False)
        while sum(server.served.values()) < 120:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(list((tmp_path / "cache/dpoctl/judge").rglob("*.json")))
        assert kept >= 110
        run(tmp_path, *args)
        # only requests in flight at the kill, at most one per thread, can have been made twice
        assert sum(server.served.values()) <= 400 + 4
    assert len(rows_of(tmp_path / "j.jsonl")) == 400


def test_requests_that_keep_failing_stay_pending(tmp_path):
    a, b = candidates(tmp_path, 6)

    class Stubborn(JudgeServer):
        healthy = False

        def fault_of(self, text):
            return "500" if "Question 3?" in text and not self.healthy else None

    with Stubborn(likes_good) as server:
        args = [a, b, "--model", "m", "--base-url", server.url, "--retries", "1", "--out", "j.jsonl"]
        _, err = run(tmp_path, *args, code=75)
        assert "2 judgements are pending" in err and not (tmp_path / "j.jsonl").exists()
        server.healthy = True
        run(tmp_path, *args)
        assert max(server.served.values()) == 1
    assert len(rows_of(tmp_path / "j.jsonl")) == 12


def test_the_cost_is_a_limit_over_all_calls_of_the_command(tmp_path):
    """0.011 dollars an answer: 0.72 are enough for 65, more than the first batch of rows that is written."""
    a, b = candidates(tmp_path, 70)
    with JudgeServer(likes_good) as server:
        args = [
            a,
            b,
            "--model",
            "m",
            "--base-url",
            server.url,
            *"--price-in 100 --price-out 100 --order random --out j.jsonl".split(),
        ]
        for _ in range(2):  # the second call spends nothing more
            _, err = run(tmp_path, *args, "--max-cost", "0.72", code=2)
            assert "--max-cost 0.72 is reached: 0.7150 dollars for 65 answers, 5 are left" in err
            assert sum(server.served.values()) == 65
        run(tmp_path, *args, "--max-cost", "10")
        assert sum(server.served.values()) == 70
    cost = json.loads((tmp_path / "j.jsonl.manifest.json").read_text())["cost"]
    assert cost["dollars"] == pytest.approx(70 * 0.011) and cost["asked"] + cost["from_cache"] == 70


@pytest.mark.parametrize(("answer", "verdicts"), [(None, {"invalid"}), ("\ud800\nPreferred: A", {"a", "b"})])
def test_an_answer_without_a_verdict_is_not_requested_again(tmp_path, answer, verdicts):
    """No text at all (a refusal, or reasoning that filled the answer); half a character."""
    a, b = candidates(tmp_path, 3)
    with JudgeServer(lambda text: answer) as server:
        _, err = run(tmp_path, a, b, "--model", "m", "--base-url", server.url, "--out", "j.jsonl")
        assert server.requests == 6
    assert {row["verdict"] for row in rows_of(tmp_path / "j.jsonl")} == verdicts
    assert ("6 judgements are invalid (100.0%): 6 no answer" in err) == (answer is None)


def test_a_server_that_is_down_is_not_asked_everything(tmp_path):
    a, b = candidates(tmp_path, 200)
    with JudgeServer(likes_good, status=503) as server:
        args = ["--model", "m", "--base-url", server.url, "--retries", "0", "--concurrency", "16", "--out", "j.jsonl"]
        _, err = run(tmp_path, a, b, *args, code=75)
        assert server.requests == 128 and "400 judgements are pending: status 503" in err


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (None, 0),
        ("2.5", 2.5),
        ("900", 60),
        ("-1", 0),
        ("soon", 0),
        ("Fri, 31 Dec 2100 23:59:59 GMT", 60),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_the_wait_that_a_server_asks_for(asked, seconds):
    assert retry_after_s({"retry-after": asked}) == seconds


def test_a_traceback_does_not_hold_the_key(tmp_path):
    """An internal error while the key is known: exit 1 and a traceback, without the key."""
    candidates(tmp_path, 2)
    fault = "import openai; openai.OpenAI = lambda **given: 1 / 0; from dpoctl.__main__ import main; main()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OPENAI_API_KEY": KEY}
    args = [sys.executable, "-c", fault, "judge", "a.jsonl", "b.jsonl", "--model", "m", "--out", "j.jsonl"]
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and KEY not in done.stdout + done.stderr


def test_a_template_is_an_input(tmp_path):
    a, b = candidates(tmp_path, 2)
    (tmp_path / "mine.txt").write_text("{prompt}\n{a}\n{b}\nPreferred: A or B?")
    with JudgeServer(lambda text: "Preferred: A") as server:
        args = [a, b, "--model", "m", "--base-url", server.url, "--criterion", "mine.txt", "--out", "j.jsonl"]
        run(tmp_path, *args)
        (tmp_path / "mine.txt").write_text("{prompt}\n{a}\n{b}\nPreferred: B or A?")
        _, err = run(tmp_path, *args, code=2)
    assert "was started with a different --criterion" in err


def test_a_judge_that_always_says_a(tmp_path):
    a, b = candidates(tmp_path, 200)
    with JudgeServer(lambda text: "Preferred: A") as server:
        common = [a, b, "--model", "m", "--base-url", server.url, "--concurrency", "16"]
        run(tmp_path, *common, "--out", "both.jsonl")
        run(tmp_path, *common, "--order", "random", "--out", "random.jsonl")
    both, drawn = (
        json.loads((tmp_path / f"{n}.jsonl.manifest.json").read_text())["metrics"]["summary"]
        for n in ("both", "random")
    )
    assert both["ties"] == 200 and both["flips"] == 1.0 and both["win_rate"] == 0.5
    assert drawn["ties"] == 0 and abs(drawn["win_rate"] - 0.5) < 0.12  # 3.4 standard errors of 200 fair coins


def test_against_the_reference_with_a_canary(tmp_path):
    candidates(tmp_path, 20, reference="bad reference")

    def decide(text: str) -> str:
        _, a, b = fenced(text)
        return f"Preferred: {'A' if 'good' in a or ('reference' in a and 'good' not in b) else 'B'}"

    with JudgeServer(decide) as server:
        run(tmp_path, "a.jsonl", "--model", "m", "--base-url", server.url, "--canary", "I like it", "--out", "j.jsonl")
    metrics = json.loads((tmp_path / "j.jsonl.manifest.json").read_text())["metrics"]
    assert (
        metrics["summary"]["win_rate"] == 1.0 and metrics["canary"]["win_rate"] == 0.0 and metrics["canary"]["n"] == 20
    )


def test_a_scorer_judges_offline_and_two_policies_are_compared(tmp_path):
    (tmp_path / "s.py").write_text("def f(rows):\n    return [len(r['completion']) for r in rows]\n")
    candidates(tmp_path, 12, good="longer text")
    common = ["--backend", "scorer", "--scorer", "python:s.py:f"]
    run(tmp_path, "b.jsonl", "b.jsonl", *common, "--out", "same.jsonl")
    out, err = run(
        tmp_path,
        "a.jsonl",
        "b.jsonl",
        *common,
        *"--compare same.jsonl --against same.jsonl --out j.jsonl".split(),
    )
    metrics = json.loads((tmp_path / "j.jsonl.manifest.json").read_text())["metrics"]
    assert (
        metrics["summary"]["win_rate"] == 1.0
        and metrics["compare"]["difference"] == 0.5
        and metrics["compare"]["p"] == 0
    )
    assert metrics["against"]["raw"] == 0.0 and "kappa" in err and "1.000" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a.jsonl", "c.jsonl", "--model", "m"], "counterpart"),
        (["a.jsonl", "--model", "m"], "counterpart"),
        (["a.jsonl", "b.jsonl"], "--model is required"),
        (["a.jsonl", "b.jsonl", "--model", "m", "--max-cost", "1"], "--price-in"),
        (["a.jsonl", "b.jsonl", "--backend", "scorer", "--model", "m"], "--scorer is required"),
        (["a.jsonl", "b.jsonl", "a.jsonl", "--model", "m"], "given twice"),
        (["a.jsonl", "b.jsonl", "--model", "m", "--price-in", "1"], "go together"),
        (["a.jsonl", "b.jsonl", "--model", "m", "--score-text", "completion"], "--score-text "),
        (["a.jsonl", "b.jsonl", "--model", "m", "--device", "cpu"], "--device "),
        (["a.jsonl", "b.jsonl", "--model", "m", "--base-url", "localhost:8000/v1"], "expected http://"),
        (["a.jsonl", "b.jsonl", "--model", "m", "--criterion", "helpfull"], "summary-c"),
        (["a.jsonl", "b.jsonl", "--model", "m", "--cache-dir", "c.jsonl"], "is a file; a directory is needed"),
    ],
)
def test_mistakes_are_one_clear_message(tmp_path, args, said):
    candidates(tmp_path, 3)
    write(tmp_path / "c.jsonl", [{"prompt_id": "x", "prompt": "other", "completion": "y", "k": 0}])
    server = [] if "--base-url" in args else ["--base-url", "http://127.0.0.1:9/v1"]
    _, err = run(tmp_path, *args, *server, "--out", "j.jsonl", code=2)
    assert said in err and err.count("error:") == 1
