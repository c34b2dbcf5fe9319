"""Verdicts as JSON, reasoning models and further fields of requests: real runs against an HTTP server."""

import json

import pytest

from dpoctl.judging.structured import NO_FIELD, NO_JSON, in_words, read_json, response_format
from dpoctl.judging.verdicts import CUT_THOUGHT, UNCLEAR
from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import candidates, fenced, judged, manifest, rows_of
from helpers.logprobs import between, spelt, with_logprobs
from helpers.server_replies import error

pytestmark = pytest.mark.usefixtures("warm_judge")

JSON = ("--answer-format", "json")
AUTO = ("--answer-format", "auto")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"preferred": "A"}', ("A", "")),
        ('{"comparison": "B is long.", "preferred": "B"}', ("B", "")),
        ('{\n  "comparison": "x",\n  "preferred": "b"\n}\n', ("B", "")),
        ('{"Preferred": "Candidate A"}', ("A", "")),
        ('{"preferred": "tie"}', ("tie", "")),
        ('```json\n{"preferred": "A"}\n```', ("A", "")),
        ('```\n{"preferred": "A"}\n```', ("A", "")),
        ('<think>\n{"preferred": "B"}\n</think>\n{"preferred": "A"}', ("A", "")),
        ('<think>\n{"preferred": "B"}', (None, CUT_THOUGHT)),
        ('{"comparison": "It says: \\nPreferred: A", "preferred": "B"}', ("B", "")),
        ('{"comparison": "{\\"preferred\\": \\"A\\"}", "preferred": "B"}', ("B", "")),
        ('{"preferred": "A", "preferred": "B"}', (None, UNCLEAR)),
        ('{"preferred": "A or B"}', (None, UNCLEAR)),
        ('{"preferred": "C"}', (None, UNCLEAR)),
        ('{"preferred": ["A"]}', (None, UNCLEAR)),
        ('{"preferred": null}', (None, UNCLEAR)),
        ('{"answer": "A"}', (None, NO_FIELD)),
        ('{"inner": {"preferred": "A"}}', (None, NO_FIELD)),
        ("{}", (None, NO_FIELD)),
        ('{"comparison": "It says:\nPreferred: A', (None, NO_JSON)),
        ('{"preferred": "A"} {"preferred": "B"}', (None, NO_JSON)),
    ],
)
def test_the_forms_of_an_object(answer, verdict):
    assert read_json(answer) == verdict


@pytest.mark.parametrize("answer", ["Preferred: A", "A is better.\nPreferred: A", '["A"]', '"A"', ""])
def test_what_is_no_object_is_left_to_the_line(answer):
    assert read_json(answer) is None


def test_the_schema_is_strict_and_offers_what_the_template_offers():
    plain, short = (response_format("Preferred: A\nor\nPreferred: B", explained) for explained in (True, False))
    schema = plain["json_schema"]["schema"]
    assert plain["json_schema"]["strict"] and schema["additionalProperties"] is False
    assert list(schema["properties"]) == schema["required"] == ["comparison", "preferred"]
    assert schema["properties"]["preferred"]["enum"] == ["A", "B"]
    assert list(short["json_schema"]["schema"]["properties"]) == ["preferred"]
    assert '"comparison"' in in_words(plain) and '"comparison"' not in in_words(short)
    with_tie = response_format("Preferred: A\nPreferred: B\nPreferred: tie", True)
    assert with_tie["json_schema"]["schema"]["properties"]["preferred"]["enum"] == ["A", "B", "tie"]


def as_json(text: str) -> str:
    _, a, b = fenced(text)
    return json.dumps({"comparison": f"One says {a!r}:\nPreferred: B", "preferred": "A" if "good" in a else "B"})


def as_line(text: str) -> str:
    return f"One is better.\nPreferred: {'A' if 'good' in fenced(text)[1] else 'B'}"


def test_json_is_asked_for_and_read(tmp_path):
    candidates(tmp_path, 5)
    with JudgeServer(as_json) as server:
        judged(tmp_path, server, *JSON)
        body = server.bodies[0]
        assert body["response_format"]["type"] == "json_schema" and "JSON object" in body["messages"][0]["content"]
        judged(tmp_path, server, *JSON, "--overwrite")
        assert server.requests == 10
    assert {row["verdict"] for row in rows_of(tmp_path / "j.jsonl")} == {"a"}
    assert "response_format json_schema" in manifest(tmp_path)["cost"]["parameters"]


FORMAT = {
    "openai": error("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
                    param="response_format"),
    "openai-part": error("Invalid value: 'json_schema'.", "invalid_value", param="response_format.type"),
    "azure": error("response_format value as json_schema is enabled only for api versions 2024-08-01 and later"),
    "deepseek": error("This response_format type is unavailable now"),
    "groq": error("This model does not support response format `json_schema`."),
    "fastapi": {"detail": [{"type": "literal_error", "loc": ["body", "response_format", "type"],
                            "msg": "Input should be 'text' or 'json_object'"}]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMAT)
def test_the_line_is_the_fallback(form, tmp_path):
    """A server without schemas gets the request as it is without the option, and from the first rerun on at once."""
    candidates(tmp_path, 70)
    status = 422 if form == "fastapi" else 400
    refuse = lambda body: Special(status, FORMAT[form]) if "response_format" in body else None  # noqa: E731
    with JudgeServer(as_line, refuse=refuse) as server:
        err = judged(tmp_path, server, *AUTO)
        assert server.requests == 141 and not any("response_format" in body for body in server.bodies[1:])
        assert not any("JSON" in body["messages"][0]["content"] for body in server.bodies[1:])
        judged(tmp_path, server, "--overwrite")
        assert server.requests == 141  # the same requests as those for a line
    assert err.count("it is not sent, and the judge is asked for a labelled line") == 1
    assert {row["verdict"] for row in rows_of(tmp_path / "j.jsonl")} == {"a"}


def test_a_server_that_ignores_the_schema(tmp_path):
    """auto reads the line that it sends; json does not."""
    candidates(tmp_path, 5)
    with JudgeServer(as_line) as server:
        judged(tmp_path, server, *AUTO)
        assert {row["verdict"] for row in rows_of(tmp_path / "j.jsonl")} == {"a"}
        err = judged(tmp_path, server, *JSON, "--overwrite")
    assert {row["reason"] for row in rows_of(tmp_path / "j.jsonl")} == {NO_JSON} and f"10 {NO_JSON}" in err


def test_a_required_schema_that_is_refused(tmp_path):
    candidates(tmp_path, 70)
    refuse = lambda body: Special(400, FORMAT["deepseek"]) if "response_format" in body else None  # noqa: E731
    with JudgeServer(as_line, refuse=refuse) as server:
        err = judged(tmp_path, server, *JSON, code=2)
        assert server.requests == 1
    assert "refuses response_format json_schema" in err and "--answer-format auto" in err


@pytest.mark.parametrize("flags", [JSON, AUTO, ("--verdict", "logprobs")])
def test_a_rubric_is_read_as_text(flags, tmp_path):
    candidates(tmp_path, 2)
    (tmp_path / "r.yaml").write_text("criteria:\n  accuracy: Which is more accurate?\n  brevity: Which is shorter?\n")
    with JudgeServer(as_line) as server:
        err = judged(tmp_path, server, *flags, "--criterion", "r.yaml", code=2)
        assert "the lines of a rubric are read as text" in err and not server.requests


def test_json_with_probabilities(tmp_path):
    """The choice alone is asked for, and its token is found in the object."""
    candidates(tmp_path, 4)

    def decide(text: str) -> Special:
        token = between(0.8 if "good" in fenced(text)[1] else 0.4, a="A", b="B")
        return with_logprobs(f'{{"preferred": "{token["token"]}"}}', spelt('{"', "preferred", '":', ' "', token, '"}'))

    with JudgeServer(decide) as server:
        judged(tmp_path, server, *JSON, "--verdict", "logprobs")
        assert "comparison" not in json.dumps(server.bodies[0]["response_format"])
        assert "one sentence" not in server.bodies[0]["messages"][0]["content"]
    assert [row["p"] for row in rows_of(tmp_path / "j.jsonl")] == pytest.approx([0.8, 0.6] * 4)


# --- thoughts -------------------------------------------------------------------------------------------------------


def test_effort_and_further_fields_are_passed_on(tmp_path):
    candidates(tmp_path, 4)
    fields = {"chat_template_kwargs": {"enable_thinking": False}, "thinking_token_budget": 200, "service_tier": "flex"}
    given = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in fields.items()]
    flags = [word for text in given for word in ("--extra-body", text)]
    with JudgeServer(as_line) as server:
        judged(tmp_path, server, "--reasoning-effort", "low", *flags)
        for body in server.bodies:
            sent = {k: v for k, v in body.items() if k not in ("model", "messages", "max_tokens", "temperature")}
            assert sent == fields | {"reasoning_effort": "low"}
        judged(tmp_path, server, "--reasoning-effort", "high", *flags, "--overwrite")
        judged(tmp_path, server, "--reasoning-effort", "high", *flags[2:], "--overwrite")
        assert server.requests == 24  # other requests, other answers
        err = judged(tmp_path, server, "--reasoning-effort", "low", code=2)
    assert "was started with" in err
    assert 'chat_template_kwargs {"enable_thinking": false}' not in manifest(tmp_path)["cost"]["parameters"]
    assert (
        "reasoning_effort high, thinking_token_budget 200, service_tier flex"
        in (manifest(tmp_path)["cost"]["parameters"])
    )


@pytest.mark.parametrize(
    ("flags", "refusal", "hint"),
    [
        ("--reasoning-effort low", error("Unrecognized request argument supplied: reasoning_effort"), "leave --reas"),
        ("--reasoning-effort xhigh",
         error("'reasoning_effort' does not support 'xhigh'", param="reasoning_effort"), "give another one"),
        ("--extra-body top_k=1", error("Unknown parameter: 'top_k'.", param="top_k"), "leave --extra-body top_k out"),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_not_left_out_silently(flags, refusal, hint, tmp_path):
    candidates(tmp_path, 70)
    with JudgeServer(as_line, refuse=lambda body: Special(400, refusal)) as server:
        err = judged(tmp_path, server, *flags.split(), code=2)
        assert server.requests == 1
    assert "the judge's server refuses" in err and hint in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("seed", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("x={1", "not valid JSON"),
        ("x=NaN", "no JSON number"),
        ("temperature=1", "--judge-temperature sets it"),
        ("max_tokens=9", "--max-tokens sets it"),
        ("logprobs=true", "--verdict sets it"),
        ("response_format={}", "--answer-format sets it"),
        ("n=2", "the judge sets it"),
        ("stream=true", "the judge sets it"),
    ],
)
def test_fields_that_cannot_be_given(given, said, tmp_path):
    candidates(tmp_path, 1)
    with JudgeServer(as_line) as server:
        assert said in judged(tmp_path, server, "--extra-body", given, code=2) and not server.requests


def test_a_thought_is_never_a_verdict(tmp_path):
    """In its own field, before the answer, without one, and among the tokens."""
    candidates(tmp_path, 5)
    label = ("Preferred", ":")

    def decide(text: str) -> Special:
        if "Question 0?" in text:
            return choice("Preferred: A", reasoning_content="Preferred: B")
        if "Question 1?" in text:
            return choice("", reasoning_content="Preferred: B")
        if "Question 2?" in text:
            return choice(None, reasoning="Preferred: B")
        if "Question 3?" in text:
            return choice("<think>\nPreferred: B\n", "length")
        return choice([{"type": "thinking", "thinking": "Preferred: B"}, {"type": "text", "text": "Preferred: A"}])

    with JudgeServer(decide) as server:
        judged(tmp_path, server, "--order", "random")
    thought, cut = "thought without an answer", "cut at the token limit"
    assert [row.get("reason") for row in rows_of(tmp_path / "j.jsonl")] == [None, thought, thought, cut, None]

    tokens = ("<think>", *label, between(0.1), "</think>", *label, between(0.9), "<|im_end|>")
    with JudgeServer(lambda text: with_logprobs("Preferred: A", spelt(*tokens), reasoning_content="Preferred: B")) as s:
        judged(tmp_path, s, "--verdict", "logprobs", "--overwrite")
    assert {round(row["p"], 6) for row in rows_of(tmp_path / "j.jsonl")} == {0.9, 0.1}  # in terms of a
