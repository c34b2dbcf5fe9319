"""Judging by servers of all kinds: requests refused for their content, parameters not taken, odd replies."""

import json
import re
import signal
import time
from collections import Counter

import pytest

from dpoctl.judging.client import _retry_after
from dpoctl.judging.server_errors import CONTENT, FATAL, REFUSED, TRANSIENT, read_error
from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import candidates, likes_good, rows_of, run

BAD = "Question 3?"  # what the servers here take exception to


def error(message: str, code=None, kind: str = "invalid_request_error", param=None) -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


REFUSALS = {
    "openai-context": Special(
        400,
        error("This model's maximum context length is 8192 tokens. Please reduce it.", "context_length_exceeded"),
    ),
    "openai-policy": Special(400, error("Invalid prompt: it was flagged under our usage policy.", "invalid_prompt")),
    "azure": Special(
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering the content management policy.",
                "code": "content_filter",
                "status": 400,
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
            }
        },
    ),
    "vllm-old": Special(
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 2048 tokens. However, you requested 3000 tokens.",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "vllm": Special(
        400,
        error(
            "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context length is 2048.",
            400,
            "BadRequestError",
        ),
    ),
    "sglang": Special(
        400, {"object": "error", "message": "The input (5000 tokens) is longer than the model's context."}
    ),
    "llama.cpp": Special(
        400,
        error("the request exceeds the available context size, try increasing it", 400, "exceed_context_size_error"),
    ),
    "llama.cpp-500": Special(500, error("input is too large to process. increase the batch size", 500, "server_error")),
    "tgi": Special(422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096"}),
    "anthropic": Special(
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"},
        },
    ),
    "anthropic-413": Special(413, {"type": "error", "error": {"type": "request_too_large", "message": "Too large"}}),
    "openrouter": Special(
        403,
        {
            "error": {
                "code": 403,
                "message": "m requires moderation. Your input was flagged",
                "metadata": {"reasons": ["violence"]},
            }
        },
    ),
    "openrouter-200": Special(200, {"error": {"code": 400, "message": "maximum context length is 8192 tokens"}}),
    "gemini": Special(400, [{"error": {"code": 400, "message": "The input token count (9) exceeds the maximum (8)."}}]),
    "groq-413": Special(
        413, error("Request too large for model m on tokens per minute", "rate_limit_exceeded", "tokens")
    ),
    "firewall": Special(403, "<html><head><title>403 Forbidden</title></head><body>Rule 949110</body></html>"),
    "unknown-400": Special(400, error("Something about this one.")),
    "no-body": Special(400, ""),
    "filtered": choice("Half an answ", "content_filter"),
    "filtered-null": choice(None, "content_filter", usage=False),
    "safety": choice("", "SAFETY"),
    "refusal": choice(None, "stop", refusal="I cannot compare these."),
    "refusal-finish": choice("", "refusal"),
    "null": choice(None),
    "thought-only": choice(None, "stop", reasoning_content="Preferred: A"),
    "thought-cut": choice("", "length", reasoning_content="Preferred: A"),
    "cut": choice("One is shorter.\nPreferred: A", "length"),
    "thought-unclosed": choice("<think>One is shorter.\nPreferred: A"),
    "parts": choice([{"type": "thinking", "thinking": [{"type": "text", "text": "x"}]}, {"type": "text", "text": "?"}]),
    "no-choice": Special(200, {"id": "1", "object": "chat.completion", "choices": [], "usage": None}),
}
SAID = {  # what `raw` and `reason` say
    "openai-context": ("too long for the judge", "context_length_exceeded"),
    "openai-policy": ("content filter", "usage policy"),
    "azure": ("content filter", "content_filter"),
    "vllm-old": ("too long for the judge", "2048 tokens"),
    "vllm": ("too long for the judge", "maximum context length"),
    "sglang": ("too long for the judge", "5000 tokens"),
    "llama.cpp": ("too long for the judge", "exceed_context_size_error"),
    "llama.cpp-500": ("too long for the judge", "status 500"),
    "tgi": ("too long for the judge", "max_new_tokens"),
    "anthropic": ("too long for the judge", "prompt is too long"),
    "anthropic-413": ("too long for the judge", "request_too_large"),
    "openrouter": ("content filter", "violence"),
    "openrouter-200": ("too long for the judge", "8192"),
    "gemini": ("too long for the judge", "token count"),
    "groq-413": ("too long for the judge", "Request too large"),
    "firewall": ("refused by the server", "403 Forbidden"),
    "unknown-400": ("refused by the server", "Something about this one."),
    "no-body": ("refused by the server", "400"),
    "filtered": ("content filter", "content_filter] Half an answ"),
    "filtered-null": ("content filter", "finish_reason content_filter"),
    "safety": ("content filter", "SAFETY"),
    "refusal": ("declined by the judge", "I cannot compare these."),
    "refusal-finish": ("content filter", "finish_reason refusal"),
    "null": ("no answer", "no answer"),
    "thought-only": ("thought without an answer", "thought"),
    "thought-cut": ("cut at the token limit", "cut"),
    "cut": ("cut at the token limit", "One is shorter."),
    "thought-unclosed": ("unfinished thought", "<think>"),
    "parts": ("no line with a verdict", "?"),
    "no-choice": ("refused by the server", "no choice"),
}


def judged(tmp_path, server, *args: str, code: int = 0) -> str:
    more = ["--model", "m", "--base-url", server.url, "--retries", "1", "--out", "j.jsonl", *args]
    return run(tmp_path, "a.jsonl", "b.jsonl", *more, code=code)[1]


def manifest(tmp_path) -> dict:
    return json.loads((tmp_path / "j.jsonl.manifest.json").read_text())


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


# --- parameters ------------------------------------------------------------------------------------------------------


def picky(forms: dict[str, Special], values=()):
    """Refuses requests that hold one of the parameters, each in the form of its server."""

    def refuse(body: dict) -> Special | None:
        return next((form for name, form in forms.items() if name in body), None)

    return refuse


TEMPERATURE = {
    "openai": error(
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
        "unsupported_value",
        param="temperature",
    ),
    "no-param": error("temperature is not supported by m; supported: model, messages, max_tokens"),
    "anthropic": {"type": "error", "error": {"message": "`temperature` is deprecated for this model."}},
    "strict": {"error": "Input validation error: `temperature` must be strictly positive"},
    "fastapi": {
        "detail": [{"type": "extra_forbidden", "loc": ["body", "temperature"], "msg": "Extra inputs", "input": 0}]
    },
}
LIMIT = {
    "openai": error(
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "unsupported_parameter",
        param="max_tokens",
    ),
    "no-param": error("Unrecognized request argument supplied: max_tokens"),
    "other-named": error("max_completion_tokens is required"),
    "fastapi": {
        "detail": [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs", "input": 9}]
    },
}


@pytest.mark.parametrize("form", LIMIT)
def test_max_completion_tokens_is_learnt_once(form, tmp_path):
    candidates(tmp_path, 70)  # two batches
    status = 422 if form == "fastapi" else 400
    with JudgeServer(likes_good, refuse=picky({"max_tokens": Special(status, LIMIT[form])})) as server:
        err = judged(tmp_path, server)
        assert server.requests == 141 and max(server.served.values()) == 1  # one request learns it
        assert all(b["max_completion_tokens"] == 1024 and b["temperature"] == 0 for b in server.bodies[1:])
    assert {r["verdict"] for r in rows_of(tmp_path / "j.jsonl")} == {"a"}
    assert err.count("takes max_completion_tokens in place of max_tokens") == 1
    assert manifest(tmp_path)["cost"]["parameters"] == "max_completion_tokens 1024, temperature 0"


def test_max_tokens_is_learnt_from_the_other_side(tmp_path, monkeypatch):
    """Without --base-url max_completion_tokens is sent; a proxy under OPENAI_BASE_URL may not know it."""
    candidates(tmp_path, 4)
    refusal = Special(400, error("Unknown parameter: 'max_completion_tokens'.", "unknown_parameter"))
    with JudgeServer(likes_good, refuse=picky({"max_completion_tokens": refusal})) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        run(tmp_path, "a.jsonl", "b.jsonl", "--model", "m", "--out", "j.jsonl")
        assert server.requests == 9 and server.bodies[-1]["max_tokens"] == 1024


@pytest.mark.parametrize("form", TEMPERATURE)
def test_a_refused_temperature_is_said_and_recorded(form, tmp_path):
    candidates(tmp_path, 6)
    status = 422 if form in ("fastapi", "strict") else 400
    with JudgeServer(likes_good, refuse=picky({"temperature": Special(status, TEMPERATURE[form])})) as server:
        err = judged(tmp_path, server)
        assert server.requests == 13 and all("temperature" not in body for body in server.bodies[1:])
        assert all(body["max_tokens"] == 1024 for body in server.bodies)
    assert err.count("refuses temperature 0: it is not sent") == 1 and "verdicts may differ" in err
    assert manifest(tmp_path)["cost"]["parameters"] == "max_tokens 1024, temperature not sent: refused by the server"


def test_both_are_learnt_and_a_resumed_run_sends_the_same(tmp_path):
    candidates(tmp_path, 140)  # three batches
    forms = {"max_tokens": Special(400, LIMIT["openai"]), "temperature": Special(400, TEMPERATURE["openai"])}

    class Failing(JudgeServer):
        healthy = False

        def fault_of(self, text):
            return None if self.healthy or "Question 100?" not in text else "500"

    with Failing(likes_good, refuse=picky(forms)) as server:
        judged(tmp_path, server, code=75)
        first = len(server.bodies)
        assert sum(1 for body in server.bodies if "temperature" in body) == 2
        server.healthy = True
        err = judged(tmp_path, server)
        assert all(set(b) == {"model", "messages", "max_completion_tokens"} for b in server.bodies[first:])
        assert sum(server.served.values()) == 280 and "warning" not in err
    cost = manifest(tmp_path)["cost"]
    assert cost["parameters"] == "max_completion_tokens 1024, temperature not sent: refused by the server"
    assert cost["asked"] == 128 + 2 and cost["from_cache"] == 150  # of the second batch all but two


def test_a_killed_run_learns_again_and_finds_its_answers(tmp_path):
    """No batch is complete, so nothing is recorded: the parameters are learnt again, and cached answers are found."""
    candidates(tmp_path, 20)
    refuse = picky({"temperature": Special(400, TEMPERATURE["openai"])})
    with JudgeServer(likes_good, refuse=refuse) as server:
        server.decide = lambda text: Special(500, error("oops")) if "Question 15?" in text else likes_good(text)
        judged(tmp_path, server, "--retries", "0", code=75)
        assert sum(server.served.values()) == 38
        server.decide = likes_good
        judged(tmp_path, server)
        assert sum(server.served.values()) == 40


def test_a_temperature_is_not_changed_within_an_output(tmp_path):
    """Rows that were judged at temperature 0 stay alone: the rest is not judged at another one."""
    candidates(tmp_path, 70)
    with JudgeServer(likes_good) as server:
        server.decide = lambda text: Special(500, error("oops")) if "Question 69?" in text else likes_good(text)
        judged(tmp_path, server, "--retries", "0", code=75)
        server.decide, server.refuse = likes_good, picky({"temperature": Special(400, TEMPERATURE["openai"])})
        err = judged(tmp_path, server, code=2)
    assert "refuses temperature, with which" in err and "--overwrite" in err and err.count("error:") == 1


def test_cached_answers_at_another_temperature_are_not_mixed_in(tmp_path):
    candidates(tmp_path, 6)
    with JudgeServer(likes_good) as server:
        run(
            tmp_path, "a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, "--limit", "3", "--out", "k.jsonl"
        )
        server.refuse = picky({"temperature": Special(400, TEMPERATURE["openai"])})
        judged(tmp_path, server, "--price-in", "1", "--price-out", "1")
        assert sum("temperature" not in body for body in server.bodies) == 12
    assert manifest(tmp_path)["cost"]["dollars"] == pytest.approx(12 * 110 / 1e6)


def test_a_text_about_a_parameter_is_not_about_the_parameter(tmp_path):
    """After the first answer an error that names a parameter is about one text, and changes no other request."""
    candidates(tmp_path, 6)
    wrong = Special(400, error("unsupported text: 'the temperature is not supported'"))
    with JudgeServer(lambda text: wrong if BAD in text else likes_good(text)) as server:
        err = judged(tmp_path, server)
        assert all(body["temperature"] == 0 for body in server.bodies) and "not sent" not in err
    assert sum(r["verdict"] == "invalid" for r in rows_of(tmp_path / "j.jsonl")) == 2


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
    assert _retry_after(headers) == seconds


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
