"""Judging by servers that do not take every parameter: what is sent is learnt from their errors, said and recorded."""

import pytest

from helpers.judge_server import JudgeServer, Special
from helpers.judging import candidates, judged, likes_good, manifest, rows_of, run
from helpers.server_replies import BAD, LIMIT, TEMPERATURE, error

pytestmark = pytest.mark.usefixtures("warm_judge")


def picky(forms: dict[str, Special], values=()):
    """Refuses requests that hold one of the parameters, each in the form of its server."""

    def refuse(body: dict) -> Special | None:
        return next((form for name, form in forms.items() if name in body), None)

    return refuse


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
