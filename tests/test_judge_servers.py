"""Judging by servers of all kinds: requests refused for their content, errors that may pass, odd replies."""

import re
import signal
import time
from collections import Counter

import pytest

from dpoctl.runtime.http import retry_after_s
from dpoctl.runtime.server_errors import CONTENT, FATAL, REFUSED, TRANSIENT, read_error
from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import candidates, judged, likes_good, manifest, rows_of, run
from helpers.server_replies import BAD, REFUSALS, SAID, error

pytestmark = pytest.mark.usefixtures("warm_judge")


def test_one_comparison_is_invalid_and_the_rest_goes_on(tmp_path):
    """Every kind of refusal in one run, one for each question; the questions around them are judged."""
    kinds = list(REFUSALS)
    candidates(tmp_path, len(kinds) + 20)

    def decide(text: str):
        number = int(re.search(r"Question (\d+)\?", text)[1]) - 10
        return REFUSALS[kinds[number]] if 0 <= number < len(kinds) else likes_good(text)

    with JudgeServer(decide) as server:
        err = judged(tmp_path, server, "--price-in", "1", "--price-out", "1", "--max-cost", "1")
    rows = rows_of(tmp_path / "j.jsonl")
    assert len(rows) == 2 * len(kinds) + 40
    by_prompt = {f"p{i + 10}": kind for i, kind in enumerate(kinds)}
    for row in rows:
        if kind := by_prompt.get(row["prompt_id"]):
            reason, text = SAID[kind]
            assert (row["verdict"], row["reason"]) == ("invalid", reason) and text in row["raw"], kind
        else:
            assert row["verdict"] == "a" and "reason" not in row
    summary = manifest(tmp_path)["metrics"]["summary"]
    assert summary["n"] == 20 and summary["win_rate"] == 1.0
    assert summary["invalid_reasons"] == {reason: 2 * n for reason, n in Counter(r for r, _ in SAID.values()).items()}
    assert f"{2 * len(kinds)} judgements are invalid" in err and "24 too long for the judge" in err


def test_the_first_comparisons_may_be_the_refused_ones(tmp_path):
    candidates(tmp_path, 8)
    wrong = Special(400, error("Something about this one."))
    first = tuple(f"Question {i}?" for i in range(3))
    with JudgeServer(lambda text: wrong if any(q in text for q in first) else likes_good(text)) as server:
        judged(tmp_path, server)
    rows = rows_of(tmp_path / "j.jsonl")
    assert [r["verdict"] for r in rows] == ["invalid"] * 6 + ["a"] * 10


@pytest.mark.parametrize(
    ("reply", "most", "said"),
    [
        (Special(401, error("Incorrect API key", "invalid_api_key")), 1, "refuses the request: 401"),
        (Special(400, [error("API key not valid. Please pass a valid API key.")]), 1, "API key not valid"),
        (Special(404, error("The model `m` does not exist")), 1, "refuses the request: 404"),
        (Special(404, "<html><title>Not Found</title></html>"), 1, "an HTML page: Not Found"),
        (Special(429, error("You exceeded your quota", "insufficient_quota")), 1, "insufficient_quota"),
        (Special(402, error("Insufficient Balance")), 1, "refuses the request: 402"),
        (Special(400, error("Your credit balance is too low")), 1, "credit balance"),
        (Special(400, error("Bad value.")), 8, "Bad value.); so it did with 8 requests"),
        (Special(403, "<html><title>Forbidden</title></html>"), 8, "an HTML page: Forbidden"),
        (Special(400, error("max_tokens is too large: 1024. It is at most 512.", param="max_tokens")), 8, "max_tokens"),
        (REFUSALS["vllm"], 20, "so it did with all 20 requests"),
    ],
)
def test_a_server_that_refuses_everything_stops_the_command(reply, most, said, tmp_path):
    candidates(tmp_path, 10)
    with JudgeServer(lambda text: reply) as server:
        err = judged(tmp_path, server, code=2)
        assert server.requests == most and said in err and err.count("error:") == 1 and "hint:" in err
    assert not (tmp_path / "j.jsonl").exists()


def test_answers_are_kept_when_the_server_turns_away_later(tmp_path):
    """The key expires after 30 answers: they are cached, and the next call pays for none of them again."""
    candidates(tmp_path, 40)

    class Expiring(JudgeServer):
        expired = False

    with Expiring(likes_good) as server:
        server.refuse = lambda body: (
            Special(401, error("expired")) if not server.expired and sum(server.served.values()) >= 30 else None
        )
        err = judged(tmp_path, server, "--concurrency", "1", code=2)
        assert "401" in err and sum(server.served.values()) == 30
        server.expired = True
        judged(tmp_path, server)
        assert sum(server.served.values()) == 80 and max(server.served.values()) == 1
    cost = manifest(tmp_path)["cost"]
    assert cost["asked"] == 50 and cost["from_cache"] == 30


@pytest.mark.slow
def test_a_server_that_begins_to_refuse_everything(tmp_path):
    """A 400 for each request after the first 20, without a stated reason: not 180 texts, but the server."""
    candidates(tmp_path, 100)
    with JudgeServer(likes_good) as server:
        wrong = Special(400, error("Maintenance."))
        server.refuse = lambda body: wrong if sum(server.served.values()) >= 20 else None
        err = judged(tmp_path, server, "--concurrency", "1", code=2)
        assert "one after another" in err and server.requests == 20 + 33


def test_only_the_refused_one_is_left_to_ask(tmp_path):
    """All others are cached: its refusal is still about its content."""
    candidates(tmp_path, 6)
    wrong = Special(400, error("Something about this one."))
    with JudgeServer(likes_good) as server:
        judged(tmp_path, server, "--limit", "3")
        server.decide = lambda text: wrong if BAD in text else likes_good(text)
        run(
            tmp_path, "a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, "--limit", "4", "--out", "k.jsonl"
        )
        assert sum(server.served.values()) == 6
    assert [r["verdict"] for r in rows_of(tmp_path / "k.jsonl")] == ["a"] * 6 + ["invalid"] * 2


# --- odd replies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Special(502, "<html><head><title>502 Bad Gateway</title></head></html>"), "status 502 (an HTML page: 502"),
        (Special(200, "<!DOCTYPE html><html><title>Sign in</title></html>"), "an HTML page: Sign in"),
        (Special(200, 'data: {"id": "1"}\n\n'), "a malformed response"),
        (Special(200, ""), "a malformed response"),
        (Special(200, {"id": "1", "choices": [{"finish_reason": "stop"}]}), "a malformed response"),
        (Special(200, ["x"]), "a malformed response"),
        (choice("x", "error"), "finish_reason error"),
        (Special(200, error("upstream overloaded")), "upstream overloaded"),
        (Special(400, error("Rate limit reached, try again later")), "Rate limit reached"),
        (Special(429, error("You exceeded your current quota, please check your plan and billing details")), "429"),
    ],
)
def test_what_may_pass_is_retried(reply, said, tmp_path):
    candidates(tmp_path, 2)
    with JudgeServer(lambda text: reply if BAD.replace("3", "1") in text else likes_good(text)) as server:
        err = judged(tmp_path, server, code=75)
        assert "2 judgements are pending: " in err and said in err
        assert server.requests == 2 + 4
        server.decide = likes_good
        judged(tmp_path, server)


def test_a_first_request_that_keeps_failing_does_not_hold_up_the_others(tmp_path):
    candidates(tmp_path, 10)
    with JudgeServer(lambda text: Special(500, error("x")) if "Question 0?" in text else likes_good(text)) as server:
        start = time.monotonic()
        err = judged(tmp_path, server, code=75)
        assert "2 judgements are pending" in err and sum(server.served.values()) == 18
        assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after": "Fri Dec 31 23:59:59 2100"}, 60),  # asctime: a date without a zone, in UTC
        ({"retry-after": "Friday, 31-Dec-68 23:59:59 GMT"}, 60),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "inf"}, 60),
        ({"retry-after": "Fri, 99 Foo 2100 99:99:99 GMT"}, 0),
    ],
)
def test_forms_of_retry_after(headers, seconds):
    assert retry_after_s(headers) == seconds


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (429, "Rate limit reached for tokens per min: Limit 30000, Used 29000, Requested 2000", TRANSIENT),
        (429, "Request too large for m: Limit 30000, Requested 40000", CONTENT),
        (503, "The server is overloaded", TRANSIENT),
        (400, "Model names are case-sensitive", REFUSED),
        (400, "top_k is not a number", REFUSED),
        (401, "prompt is too long", FATAL),
        (404, "No route", FATAL),
        (451, "Unavailable for legal reasons", CONTENT),
    ],
)
def test_the_kind_of_an_error(status, message, kind):
    assert read_error(status, error(message)).kind == kind


@pytest.mark.parametrize(
    "body", [None, "", 7, [], [7], {}, {"error": None}, {"error": 7}, {"detail": []}, {"detail": [7]}]
)
def test_an_error_of_any_shape_is_read(body):
    assert str(read_error(400, body, "BadRequestError")).startswith("400")


@pytest.mark.slow
def test_a_signal_stops_the_first_request_too(tmp_path):
    """The server does not answer: the command ends after the attempt in flight, not after all retries."""
    a, b = candidates(tmp_path, 4)
    with JudgeServer(likes_good, faults=[(1.0, "hang")], hang_s=30) as server:
        args = [a, b, "--model", "m", "--base-url", server.url, "--timeout", "2", "--retries", "20", "--out", "j.jsonl"]
        process = run(tmp_path, *args, wait=False)
        while not server.requests:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert process.wait(timeout=60) == 75 and time.monotonic() - start < 10


@pytest.mark.parametrize(
    "usage", ["none", [1], 5, True, {"prompt_tokens": "12"}, {"prompt_tokens": None}, {"prompt_tokens": -3}]
)
def test_a_verdict_does_not_depend_on_how_tokens_are_counted(usage, tmp_path):
    def decide(text):
        found = choice(likes_good(text))
        return Special(200, {**found.body, "usage": usage})

    candidates(tmp_path, 2)
    with JudgeServer(decide) as server:
        judged(tmp_path, server)
    assert {row["verdict"] for row in rows_of(tmp_path / "j.jsonl")} == {"a"}
