"""judge --batch: batches that fail, expire and are lost on the way, killed at each state; nothing is paid twice."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from helpers import judging
from helpers.batch_server import BatchServer
from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import KEY, candidates, likes_good, manifest, rows_of, run, write
from helpers.loopback import Handler
from helpers.server_replies import LIMIT, error

pytestmark = pytest.mark.usefixtures("warm_judge")

STEPS = ("upload", "submit", "look", "download")


def batched(folder: Path, server, *args: str, code: int = 0) -> str:
    """What is said as the two files are compared in batches, into j.jsonl."""
    more = ["--model", "m", "--base-url", server.url, "--batch", "--batch-poll", "0.02", "--out", "j.jsonl", *args]
    return run(folder, "a.jsonl", "b.jsonl", *more, code=code)[1]


def records(folder: Path) -> list[Path]:
    return list((folder / "cache/dpoctl/judge/batches").glob("*.json"))


def test_the_rows_are_those_of_single_calls_at_half_the_price(tmp_path):
    candidates(tmp_path, 6)

    def decide(text: str) -> str:
        return "I cannot say." if "Question 2?" in text else likes_good(text)

    prices = ["--price-in", "1", "--price-out", "10"]
    with JudgeServer(decide) as server:
        single = run(
            tmp_path, "a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, *prices, "--out", "s.jsonl"
        )
    with BatchServer(decide) as server:
        err = batched(tmp_path, server, *prices, "--max-cost", "1")
        assert set(server.paid.values()) == {1} and len(server.paid) == 12 and server.steps["submit"] == 1
        assert server.keys == {f"Bearer {KEY}"}
        (line, *_) = server.lines_of(server.batches[0])
        assert (line["method"], line["url"], len(line["custom_id"])) == ("POST", "/v1/chat/completions", 64)
        assert line["body"]["max_tokens"] == 1024 and line["body"]["temperature"] == 0
    assert (tmp_path / "j.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()
    cost = manifest(tmp_path)["cost"]
    dollars = 12 * (100 * 1 + 10 * 10) / 1e6
    assert cost["dollars"] == pytest.approx(dollars / 2)
    assert (cost["asked"], cost["batched"], cost["from_cache"]) == (12, 12, 0)
    at_most = re.search(r"submitting 12 requests in 1 batch, at most about ([\d.]+) dollars", err)
    assert dollars / 2 < float(at_most[1]) < 12 * (1000 * 1 + 1024 * 10) / 1e6 / 2
    assert f"{dollars / 2:.4f} dollars" in err and not records(tmp_path)
    assert not (tmp_path / "j.jsonl.refusals").exists()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY not in file.read_text(errors="replace")
    # answers of single calls and of batches are one cache
    with BatchServer(decide) as other:
        other.loopback.port = 0
        more = ["--model", "m", "--base-url", server.url, "--out", "k.jsonl", *prices]
        _, err = run(tmp_path, "a.jsonl", "b.jsonl", *more)
    assert "12 answers came from the cache" in err and json.loads((tmp_path / "k.jsonl.manifest.json").read_text())[
        "cost"
    ]["dollars"] == pytest.approx(dollars / 2)
    assert single


FAULTS = [
    *(("upload", 1, "500"), ("upload", 2, "lost")),
    *(("submit", 1, "lost"), ("submit", 2, "500"), ("submit", 3, "lost-500"), ("list", 2, "drop")),
    *(("look", 2, "drop"), ("look", 3, "html"), ("look", 5, "429")),
    *(("download", 1, "truncated"), ("download", 2, "short"), ("download", 4, "shorn"), ("download", 6, "500")),
]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_faulty_server_killed_at_each_state(tmp_path, count):
    """Every step is killed before and after it is done; batches expire, fail and lose requests; answers are cut."""
    candidates(tmp_path, count)
    once = set()

    def decide(text: str) -> str | Special:
        number = int(re.search(r"Question (\d+)\?", text)[1])
        if number % 10 == 3 and text not in once:  # fails the first time
            once.add(text)
            return Special(500, error("oops"))
        return Special(400, error("flagged", "content_filter")) if number % 25 == 7 else likes_good(text)

    def fail(batch: dict) -> dict | None:
        return {"code": "invalid_request", "message": "odd"} if batch["id"] == "batch-2" else None

    kills = [(step, when) for step in STEPS for when in ("before", "after")]
    with BatchServer(decide, FAULTS, ends={1: "expired", 3: "expired"}) as server:
        server.fail = fail
        args = ["a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, "--retries", "5", "--out", "j.jsonl"]
        args += ["--batch", "--batch-poll", "0.02", "--price-in", "1", "--price-out", "10", "--order", "random"]
        for kill in kills:
            killed_at(tmp_path, server, kill, args)
        run(tmp_path, *args)
        assert max(server.paid.values()) == 1 and len(server.paid) == count - count // 25
        assert all(server.steps[step] >= number for step, number, _ in FAULTS), server.steps
    rows = rows_of(tmp_path / "j.jsonl")
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(count)]
    for i, row in enumerate(rows):
        assert row["verdict"] == ("invalid" if i % 25 == 7 else "a"), row
        assert row.get("reason") == ("content filter" if i % 25 == 7 else None)
    assert manifest(tmp_path)["cost"]["dollars"] == pytest.approx(0.96 * count * (100 * 1 + 10 * 10) / 1e6 / 2)
    assert not records(tmp_path)


def killed_at(folder: Path, server: BatchServer, kill: tuple[str, str], args: list[str]) -> None:
    """Run the command until a step, where it is killed by SIGKILL."""
    started: list[subprocess.Popen] = []
    ready = False

    def on(step: str, when: str, handler: Handler) -> None:
        while not ready:
            time.sleep(0.001)
        if (step, when) == kill and started[0].returncode is None:
            started[0].kill()
            assert handler.connection.recv(1) == b""  # the forked process has died with its caller

    server.on = on
    started.append(run(folder, *args, wait=False, starter=judging.command))
    ready = True
    out, err = started[0].communicate(timeout=100)
    server.on = lambda step, when, handler: None
    assert started[0].returncode == -signal.SIGKILL, (kill, err)


# --- what servers do -------------------------------------------------------------------------------------------------


def test_a_batch_in_flight_is_found_again(tmp_path):
    """The command is stopped while it waits: it ends at once, and its rerun submits nothing, whatever its output."""
    candidates(tmp_path, 4)
    with BatchServer(likes_good) as server:
        waits = threading.Event()
        server.on = lambda step, when, handler: waits.set() if step == "look" else None
        args = ["a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, "--out", "j.jsonl"]
        process = run(tmp_path, *args, "--batch", wait=False, starter=judging.command)
        assert waits.wait(60)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75 and time.monotonic() - start < 10
        assert "stopped by SIGTERM after 1 batch is submitted, which the server goes on with" in " ".join(err.split())
        _, err = run(tmp_path, *args, code=2)  # single calls would pay again
        assert "batch batch-1 of the judge's server, which is in flight, holds" in err and "add --batch" in err
        (record,) = records(tmp_path)
        for path in tmp_path.glob("j.jsonl*"):
            path.unlink()
        batched(tmp_path, server)
        assert server.steps["submit"] == 1 and set(server.paid.values()) == {1} and not record.exists()


def test_commands_at_the_same_time_share_a_batch(tmp_path):
    candidates(tmp_path, 4)
    with BatchServer(likes_good) as server:
        args = ["a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, "--batch", "--batch-poll", "0.1"]
        started = [run(tmp_path, *args, "--out", f"{i}.jsonl", wait=False, starter=judging.command) for i in range(3)]
        for process in started:
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
        assert set(server.paid.values()) == {1} and len(server.paid) == 8
    assert len({(tmp_path / f"{i}.jsonl").read_bytes() for i in range(3)}) == 1


def test_a_batch_that_was_cancelled_stops_the_command(tmp_path):
    candidates(tmp_path, 4)
    with BatchServer(likes_good, ends={1: "cancelled"}) as server:
        err = batched(tmp_path, server, code=75)
        assert "batch batch-1 was cancelled: 4 of its 8 requests are left" in err
        batched(tmp_path, server)
        assert set(server.paid.values()) == {1} and len(server.paid) == 8


def test_the_cost_is_a_limit_before_anything_is_submitted(tmp_path):
    candidates(tmp_path, 4)
    prices = ["--price-in", "1", "--price-out", "10"]
    with BatchServer(likes_good) as server:
        err = batched(tmp_path, server, *prices, "--max-cost", "0.04", code=2)
        assert "--max-cost 0.04 may be exceeded: 8 requests in 1 batch cost at most about 0.04" in " ".join(err.split())
        assert not server.steps
        batched(tmp_path, server, *prices, "--max-cost", "0.04", "--max-tokens", "400")
        assert len(server.paid) == 8


@pytest.mark.slow
def test_a_full_queue_is_waited_for_and_a_limit_below_a_batch_divides_it(tmp_path):
    candidates(tmp_path, 8)
    limit = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m.", "line": None}

    with BatchServer(likes_good) as server:

        def fail(batch: dict) -> dict | None:
            running = sum(
                len(server.lines_of(b)) for b in server.batches if b["status"] in ("validating", "in_progress")
            )
            return limit if batch["status"] == "validating" and running > 5 else None

        server.fail = fail
        err = batched(tmp_path, server)
        assert set(server.paid.values()) == {1} and len(server.paid) == 16
        assert "takes no batch of 16 requests" in err and "takes no batch of 8 requests" in err
        assert server.steps["submit"] < 20


def test_a_parameter_is_learnt_from_the_errors_of_a_batch(tmp_path):
    candidates(tmp_path, 4)
    with BatchServer(likes_good) as server:
        server.look = None
        decide = server.decide

        def by_body(batch: dict) -> None:
            (line, *_) = server.lines_of(batch)
            wrong = Special(400, LIMIT["openai"])
            server.decide = (lambda text: wrong) if "max_tokens" in line["body"] else decide

        server.fail = by_body
        err = batched(tmp_path, server)
        assert server.steps["submit"] == 2 and set(server.paid.values()) == {1}
    assert "takes max_completion_tokens in place of max_tokens" in err
    assert manifest(tmp_path)["cost"]["parameters"] == "max_completion_tokens 1024, temperature 0"


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ({"decide": lambda text: Special(401, error("Incorrect API key", "invalid_api_key"))}, 2, "invalid_api_key"),
        ({"decide": lambda text: Special(400, error("Bad."))}, 2, "so it did with all 4 requests"),
        (
            {"fail": lambda b: {"code": "model_not_found", "message": "no"}},
            2,
            "refuses the request: 400 model_not_found",
        ),
        ({"fail": lambda b: {"code": "odd", "message": "no"}}, 75, "4 judgements are pending: batch failed: 400 odd"),
        ({"refuse": lambda b: Special(400, error("No such endpoint."))}, 2, "No such endpoint."),
        ({"_upload": lambda *given: Special(404, error("Not Found"))}, 2, "has it batches?"),
        ({"_upload": lambda *given: Special(503, error("busy"))}, 75, "4 judgements are pending: status 503"),
        ({"_look": lambda *given: Special(404, error("No such batch"))}, 2, "does not know batch batch-1"),
        ({"_download": lambda *given: b""}, 75, "the files of batch batch-1 are incomplete: 0 of 4 results"),
    ],
)
def test_what_stops_the_command(setting, code, said, tmp_path):
    candidates(tmp_path, 2)
    with BatchServer(likes_good) as server:
        for name, value in setting.items():
            setattr(server, name, value)
        err = batched(tmp_path, server, "--retries", "1", code=code)
        assert said in " ".join(err.split()) and "hint:" in err
        kept = len(records(tmp_path))
        assert kept == ("_look" in setting or "_download" in setting)  # what was submitted may be paid for
        for name in setting:
            setattr(server, name, getattr(BatchServer(likes_good), name))
            if name.startswith("_"):
                setattr(server, name, getattr(BatchServer, name).__get__(server))
        batched(tmp_path, server)
        assert len(server.paid) == 4 and set(server.paid.values()) == {1}


def test_a_lost_submission_without_a_list_is_not_repeated(tmp_path):
    candidates(tmp_path, 2)
    with BatchServer(likes_good, [("submit", 1, "lost")]) as server:
        server._list = lambda *given: Special(405, error("Method Not Allowed"))
        err = batched(tmp_path, server, code=2)
        assert "whether a batch was submitted before the command stopped is not known" in " ".join(err.split())
        assert server.steps["submit"] == 1 and len(records(tmp_path)) == 1


def test_a_response_without_a_choice_is_paid_for_once(tmp_path):
    candidates(tmp_path, 4)
    empty = choice("x")
    empty.body["choices"] = []
    with BatchServer(lambda text: empty if "Question 1?" in text else likes_good(text)) as server:
        server.counts = False
        batched(tmp_path, server)
        assert set(server.paid.values()) == {1}
    rows = rows_of(tmp_path / "j.jsonl")
    assert [row["verdict"] for row in rows] == ["a", "a", "invalid", "invalid"] + ["a"] * 4


def test_the_plan_has_the_price_of_batches(tmp_path):
    candidates(tmp_path, 40)
    args = ["a.jsonl", "b.jsonl", "--model", "m", "--price-in", "10", "--price-out", "100", "--out", "j.jsonl"]
    plans = [
        json.loads(run(tmp_path, *args, *more, "--dry-run", "--json")[0])
        for more in ([], ["--batch"], ["--batch", "--batch-discount", "0.25"])
    ]
    full, half, most = (float(plan["dollars, at most about"]) for plan in plans)
    assert half == pytest.approx(full / 2, abs=0.02) and most == pytest.approx(full * 0.75, abs=0.02)


@pytest.mark.parametrize("pairs", [pytest.param("all", marks=pytest.mark.slow), "random"])
def test_preferences_by_batches_are_those_by_single_calls(tmp_path, pairs):
    """The pairs of all batches of prompts are asked about at once."""
    texts = ["bad", "good", "good and long", "bad and long"]
    rows = [
        {"prompt_id": f"p{i}", "prompt": f"Question {i}?", "completion": f"{text} {i}", "k": k, "finish": "stop"}
        for i in range(70)  # of 280 samples: two batches
        for k, text in enumerate(texts)
    ]
    write(tmp_path / "s.jsonl", rows)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OPENAI_API_KEY": KEY}
    made = ["make-prefs", "--samples", "s.jsonl", "--judge", "openai", "--judge-model", "m", "--pairs", pairs]
    with JudgeServer(likes_good) as single, BatchServer(likes_good) as server:
        for url, *more in (
            (single.url, "--out", "s1.jsonl"),
            (server.url, *"--judge-batch --judge-batch-poll 0.05 --out b.jsonl".split()),
        ):
            command = [*judging.command, *made, "--judge-base-url", url, *more]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170)
            assert done.returncode == 0, done.stderr
        assert server.steps["submit"] == 1 and set(server.paid) == set(single.served)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "s1.jsonl").read_bytes()
