"""Verdicts from log-probabilities: the token of the choice in many spellings, real runs, servers that give none."""

import hashlib
import itertools
import json
import math

import pytest

from dpoctl.judging.probabilities import IMPROBABLE, NO_LOGPROBS, NOT_FOUND, probability_of_a, tokens_of
from dpoctl.judging.prompts import CRITERIA, load_criterion
from dpoctl.judging.reading import as_asked
from dpoctl.judging.replies import read_answer
from dpoctl.outputs.files import seal
from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import candidates, fenced, judged, likes_good, manifest, rows_of, run
from helpers.logprobs import between, entry, spelt, sure_of_a, with_logprobs
from helpers.server_replies import error

pytestmark = pytest.mark.usefixtures("warm_judge")

LABEL = ("Pre", "ferred", ":")


def read(text: str, *tokens, choice="A"):
    return probability_of_a(text, choice, tokens_of(spelt(*tokens)))


# --- which token, which spellings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Preferred: A", [*LABEL, between(0.7)]),
        ("Preferred: A", [*LABEL, between(0.7), "<|im_end|>"]),
        ("Preferred: A", [*LABEL, between(0.7), "<\uff5cend\u2581of\u2581sentence\uff5c>"]),
        ("Preferred: A", [*LABEL, between(0.7), entry("", 0.9)]),  # an end token that decodes to nothing
        ("Preferred: A", [*LABEL, " ", between(0.7, a="A", b="B")]),
        ("Preferred: A", ["Preferred", between(0.7, a=":A", b=":B")]),
        ("Preferred: A", ["Preferred", between(0.7, a=": A", b=": B")]),
        ("Preferred: A\n", [*LABEL, between(0.7, a=" A\n", b=" B\n")]),
        ("Preferred: A", [*LABEL, between(0.7, a="A", b="B")]),  # decoded without its space
        ("Preferred: A", [*LABEL, between(0.7, a="\u0120A", b="\u0120B")]),
        ("Preferred: A", ["\u2581Preferred", ":", between(0.7, a="\u2581A", b="\u2581B")]),
        ("Preferred: a", [*LABEL, between(0.7, a=" a", b=" b")]),
        ("**Preferred:** A", ["**", "Preferred", ":**", between(0.7)]),
        ("Preferred: **A**", [*LABEL, " **", between(0.7, a="A", b="B"), "**"]),
        ("Preferred: **A**", [*LABEL, between(0.7, a=" **A", b=" **B"), "**"]),
        ("Preferred: **A**", [*LABEL, between(0.7, a="**A**", b="**B**")]),
        ("Preferred: [[A]]", [*LABEL, " [[", between(0.7, a="A", b="B"), "]]"]),
        ("Preferred: Candidate A", [*LABEL, " Candidate", between(0.7)]),
        ("Preferred: Answer A", [*LABEL, " Answer", between(0.7)]),
        ("Preferred: <b>A</b>", [*LABEL, " <", "b", ">", between(0.7, a="A", b="B"), "</", "b", ">"]),
        (r"Preferred: \boxed{A}", [*LABEL, r" \boxed", "{", between(0.7, a="A", b="B"), "}"]),
        ("Preferred:\nA", [*LABEL, "\n", between(0.7, a="A", b="B")]),
        ("Preferred: A \u2705", [*LABEL, between(0.7), entry("\ufffd", raw=b"\xe2"), entry("\ufffd", raw=b"\x9c\x85")]),
        ("Preferred: A. It is shorter", [*LABEL, between(0.7), ".", " It", " is", " shorter"]),
        ("B is long.\nPreferred: A", [between(0.1, a="A", b="B"), " is long", ".\n", *LABEL, between(0.7)]),
        ("Preferred: B\nNo:\nPreferred: A", [*LABEL, between(0.1), "\n", "No", ":\n", *LABEL, between(0.7)]),
        ("The preferred answer is A.", ["The", " preferred", " answer", " is", between(0.7), "."]),
        ('{"preferred": "A"}', ['{"', "preferred", '":', ' "', between(0.7, a="A", b="B"), '"}']),
        ('{"preferred":"A"}', ['{"', "preferred", '":"', between(0.7, a="A", b="B"), '"}']),
        ('{"preferred": "A"}', ['{"', "preferred", '":', between(0.7, a=' "A', b=' "B'), '"}']),
        ('{\n  "preferred": "A"\n}', ['{\n ', ' "', "preferred", '":', between(0.7, a=' "A"', b=' "B"'), "\n", "}"]),
        ("Preferred: A", ["<think>", "Preferred", ":", between(0.1), "</think>", "\n\n", *LABEL, between(0.7)]),
        ("Preferred: A", ["Is it", *LABEL, between(0.1), "?", "</think>", *LABEL, between(0.7), "</s>"]),
    ],
)  # fmt: skip
def test_the_token_of_the_choice(text, tokens):
    """The alternatives that count are those of the token that holds the letter, however servers cut and spell it."""
    p, reason = read(text, *tokens)
    assert (p, reason) == (pytest.approx(0.7), "")


def test_all_spellings_count():
    """(.3 + .1 + .1) of .7 for A: other tokens, such as words that begin with the letter, are neither."""
    top = {" A": 0.3, " B": 0.1, "A": 0.1, " **A": 0.1, " b": 0.05, "B.": 0.05, " Answer": 0.2, " C": 0.05, "AB": 0.01}
    p, _ = read("Preferred: A", *LABEL, entry(" A", 0.3, top))
    assert p == pytest.approx(0.5 / 0.7)


def test_tokens_that_look_alike_are_added_up():
    """Llama 2 has A with a space and without; vLLM shows both as `A`."""
    token = entry("A", 0.4)
    token["top_logprobs"] = [{"token": t, "logprob": math.log(q)} for t, q in (("A", 0.4), ("B", 0.3), ("A", 0.2))]
    assert read("Preferred: A", *LABEL, token)[0] == pytest.approx(0.6 / 0.9)


def test_the_written_token_counts_where_it_is_not_listed():
    assert read("Preferred: B", *LABEL, entry(" B", 0.2, {" A": 0.6, "\n": 0.2}), choice="B")[0] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "choice", "tokens", "reason"),
    [
        ("Preferred: A", "A", [*LABEL, entry(" A", 0.04, {" C": 0.9, " A": 0.04, " B": 0.04})], IMPROBABLE),
        ("Preferred: A", "A", [*LABEL, entry(" A", 0.3, {" *": 0.4, " A": 0.3, " [": 0.2})], IMPROBABLE),  # B: up to .1
        ("Preferred: A", "A", [*LABEL, entry(" A", 0.9)], NO_LOGPROBS),  # no alternatives
        ("Preferred: A", "A", [*LABEL, " C"], NOT_FOUND),
        ("Preferred: A", "B", [*LABEL, between(0.7)], NOT_FOUND),  # not what was read
        ("Preferred: A", "A", [*LABEL, between(0.7), " Preferred", ":", " B"], NOT_FOUND),  # not the end
        ("I choose A", "A", ["I", " choose", between(0.7)], NOT_FOUND),
    ],
)
def test_where_there_is_no_probability(text, choice, tokens, reason):
    assert read(text, *tokens, choice=choice) == (None, reason)


def test_one_candidate_far_behind_is_no_obstacle():
    """B is not among the 20: it has less than the last of them."""
    top = {" A": 0.98} | {f" x{i}": 1e-4 for i in range(19)}
    assert read("Preferred: A", *LABEL, entry(" A", 0.98, top)) == (1.0, "")


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"content": None}, {"content": []}, {"content": [1]}, {"content": [{"token": 1}]}, "x",
                 {"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": [{"A": -0.1}]},
                 {"content": [{"token": " A", "logprob": None, "top_logprobs": [{"token": " A", "logprob": -1}]}]}]
)  # fmt: skip
def test_other_forms_are_none(logprobs):
    """What the judge wrote is read all the same."""
    body = with_logprobs("Preferred: A", logprobs).body
    answer = read_answer(json.dumps(body))
    assert answer.text == "Preferred: A" and answer.tokens is None
    assert probability_of_a("Preferred: A", "A", answer.tokens) == (None, NO_LOGPROBS)


def test_infinite_log_probabilities():
    """llama.cpp and others send -inf or -9999 for what cannot be sampled."""
    for least in (-math.inf, -9999.0):
        token = entry(" A", 0.8, {" A": 0.8})
        token["top_logprobs"].append({"token": " B", "logprob": least})
        assert read("Preferred: A", *LABEL, token)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", CRITERIA)
def test_the_choice_comes_first(name):
    """After a sentence that says which is better the choice is certain: it is not asked for."""

    class Options:
        judge_verdict, judge_answer_format = "logprobs", "line"

    plain = load_criterion(name)
    text = as_asked(plain, Options).request("p", "a", "b", "k")
    assert "one sentence" in plain.request("p", "a", "b", "k") and "one sentence" not in text
    assert text.endswith("in exactly this form:\nPreferred: A\nor\nPreferred: B")


# --- real runs ------------------------------------------------------------------------------------------------------

SOFT = ("--verdict", "logprobs")


def biased(good: float, shift: float):
    """A judge with log-odds `good` for the candidate that holds the word, and `shift` for what is shown first."""

    def decide(text: str) -> Special:
        _, a, _ = fenced(text)
        return sure_of_a(1 / (1 + math.exp(-(good if "good" in a else -good) - shift)))

    return decide


def test_probabilities_are_in_terms_of_a_and_averaged(tmp_path):
    """Log-odds 1 for A and .5 for the first: both orders prefer A; 2 for the first: they flip, and the mean decides."""
    candidates(tmp_path, 6)
    for name, shift in (("j.jsonl", 0.5), ("k.jsonl", 2.0)):
        with JudgeServer(biased(1.0, shift)) as server:
            out, err = run(
                tmp_path, "a.jsonl", "b.jsonl", "--model", "m", "--base-url", server.url, "--out", name, *SOFT
            )
            sent = {json.dumps({k: v for k, v in b.items() if k != "messages"}) for b in server.bodies}
        assert [json.loads(s) for s in sent] == [
            {"model": "m", "max_tokens": 1024, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        ]
        rows = rows_of(tmp_path / name)
        ab, ba = (1 / (1 + math.exp(-1 - s)) for s in (shift, -shift))
        assert [row["p"] for row in rows] == pytest.approx([ab, ba] * 6)
        assert [row["verdict"] for row in rows] == (["a", "a"] if shift < 1 else ["a", "b"]) * 6
        made = json.loads((tmp_path / f"{name}.manifest.json").read_text())
        summary = made["metrics"]["summary"]
        assert summary["win_rate"] == pytest.approx((ab + ba) / 2) and summary["soft"] is True
        assert summary["wins"] == 6 and summary["flips"] == (shift > 1) and summary["sure"] == 0
        assert summary["interval"][0] < summary["win_rate"] < summary["interval"][1]
        assert "mean of the judge's probabilities" in err
        assert made["cost"]["parameters"] == "max_tokens 1024, temperature 0, logprobs true, top_logprobs 20"


def test_cached_answers_hold_their_probabilities_and_those_of_text_stay(tmp_path):
    candidates(tmp_path, 5)
    with JudgeServer(lambda text: biased(1.0, 0.5)(text)) as server:
        judged(tmp_path, server, *SOFT)
        first = (tmp_path / "j.jsonl").read_bytes()
        judged(tmp_path, server, *SOFT, "--overwrite")
        assert server.requests == 10 and (tmp_path / "j.jsonl").read_bytes() == first
        server.decide = likes_good
        judged(tmp_path, server, "--overwrite")
        assert server.requests == 20 and not any("logprobs" in body for body in server.bodies[10:])
        assert manifest(tmp_path)["cost"]["from_cache"] == 0 and "p" not in rows_of(tmp_path / "j.jsonl")[0]
        stored = [json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("*.json")]
        assert sum("tokens" in one for one in stored) == 10
        plain = next(one for one in stored if "tokens" not in one)
        assert set(plain) == {"id", "text", "prompt_tokens", "completion_tokens", "reason"}


def test_answers_that_older_versions_cached_stay_valid(tmp_path):
    """The key is the complete request, which has no new fields without the options; nothing is asked again."""
    candidates(tmp_path, 2)
    with JudgeServer(likes_good) as server:
        criterion, answer = load_criterion("helpful"), {"prompt_tokens": 1, "completion_tokens": 1, "reason": ""}
        for i, order in itertools.product(range(2), ("AB", "BA")):
            shown = (f"good {i}", f"bad {i}") if order == "AB" else (f"bad {i}", f"good {i}")
            content = criterion.request(f"Question {i}?", *shown, f"0 p{i} 0 None None")
            body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 1024}
            key = json.dumps({"server": server.url, **body, "temperature": 0.0}, sort_keys=True)
            digest = hashlib.sha256(key.encode()).hexdigest()
            path = tmp_path / "cache" / "dpoctl" / "judge" / digest[:2] / f"{digest}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(seal({"text": f"Preferred: {order[0]}"} | answer)))
        judged(tmp_path, server)
        assert server.requests == 0 and manifest(tmp_path)["cost"]["from_cache"] == 4
    assert [row["verdict"] for row in rows_of(tmp_path / "j.jsonl")] == ["a", "a"] * 2


REFUSED = {
    "openai": Special(403, error("You are not allowed to request logprobs from this model")),
    "openai-param": Special(400, error("This model does not support the 'logprobs' parameter.", param="logprobs")),
    "unrecognized": Special(400, error("Unrecognized request argument supplied: logprobs")),
    "gemini": Special(400, [{"error": {"code": 400, "message": "Logprobs is not supported for the current model."}}]),
    "litellm": Special(400, error("ollama_chat does not support parameters: ['logprobs'], for model=m.")),
    "fastapi": Special(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_logprobs"], "msg": "Extra"}]}),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_a_server_that_refuses_log_probabilities(form, tmp_path):
    candidates(tmp_path, 70)
    with JudgeServer(likes_good, refuse=lambda body: REFUSED[form] if "logprobs" in body else None) as server:
        err = judged(tmp_path, server, *SOFT, code=2)
        assert server.requests == 1
    assert "the judge's server refuses" in err and "logprobs" in err and "hint: --verdict text" in err
    assert not (tmp_path / "j.jsonl").exists()


TOO_MANY = {
    "vllm": error("Requested sample logprobs of 20, which is greater than max allowed: 5", 400, "BadRequestError"),
    "openai": error(
        "Invalid 'top_logprobs': integer above maximum value. Expected a value <= 5.", param="top_logprobs"
    ),
    "fireworks": error("top_logprobs must be less than or equal to 5"),
}


@pytest.mark.parametrize("form", TOO_MANY)
def test_fewer_alternatives_are_learnt(form, tmp_path):
    candidates(tmp_path, 5)
    refuse = lambda body: Special(400, TOO_MANY[form]) if body["top_logprobs"] > 5 else None  # noqa: E731
    with JudgeServer(biased(1.0, 0.0), refuse=refuse) as server:
        judged(tmp_path, server, *SOFT)
        assert [body["top_logprobs"] for body in server.bodies] == [20] + [5] * 10
    assert manifest(tmp_path)["cost"]["parameters"].endswith("top_logprobs 5")


def test_a_resumed_run_asks_for_as_few(tmp_path):
    candidates(tmp_path, 70)
    refuse = lambda body: Special(400, TOO_MANY["vllm"]) if body["top_logprobs"] > 5 else None  # noqa: E731
    with JudgeServer(biased(1.0, 0.0), refuse=refuse) as server:
        server.decide = lambda text: Special(500, error("oops")) if "Question 69?" in text else biased(1.0, 0.0)(text)
        judged(tmp_path, server, *SOFT, "--retries", "0", code=75)
        server.decide, before = biased(1.0, 0.0), server.requests
        judged(tmp_path, server, *SOFT)
        assert [body["top_logprobs"] for body in server.bodies[before:]] == [5, 5]


@pytest.mark.parametrize("logprobs", [None, spelt(*LABEL, entry(" A"))])
def test_a_server_that_sends_none_is_noticed_at_its_first_answer(logprobs, tmp_path):
    candidates(tmp_path, 70)
    with JudgeServer(lambda text: with_logprobs("Preferred: A", logprobs)) as server:
        err = judged(tmp_path, server, *SOFT, code=2)
        assert server.requests == 1
    assert "sends no log-probabilities" in err and "hint: --verdict text" in err


def test_tokens_that_do_not_spell_the_answers_are_noticed(tmp_path):
    """Such as vLLM's `token_id:123`: in the first batch, of three."""
    candidates(tmp_path, 140)
    tokens = spelt("token_id:7", entry("token_id:9", top={"token_id:9": 0.9, "token_id:8": 0.1}))
    with JudgeServer(lambda text: with_logprobs("Preferred: A", tokens)) as server:
        err = judged(tmp_path, server, *SOFT, code=2)
        assert server.requests == 128
    assert "tokens that do not spell its answers" in err and "hint: --verdict text" in err


def test_reasons_of_single_answers(tmp_path):
    """A tie that is written counts half; an answer without its probabilities is invalid, and so is one that is cut."""
    candidates(tmp_path, 5)

    def decide(text: str) -> Special:
        if "Question 1?" in text:
            return choice("Preferred: A")
        if "Question 2?" in text:
            return with_logprobs("Preferred: A or B", spelt(*LABEL, between(0.7), " or", " B"))
        if "Question 3?" in text:
            return with_logprobs("Preferred: tie", spelt(*LABEL, " tie"))
        if "Question 4?" in text:
            return with_logprobs("Preferred: A", spelt(*LABEL, entry(" A", 0.04, {" C": 0.9, " A": 0.04, " B": 0.04})))
        return sure_of_a(0.8)

    with JudgeServer(decide) as server:
        err = judged(tmp_path, server, *SOFT)
    rows = rows_of(tmp_path / "j.jsonl")[::2]
    assert [row.get("reason") for row in rows] == [None, NO_LOGPROBS, "unclear verdict", None, IMPROBABLE]
    assert [row.get("p") for row in rows] == [pytest.approx(0.8), None, None, 0.5, None]
    assert "6 judgements are invalid" in err
    assert manifest(tmp_path)["metrics"]["summary"]["ties"] == 2  # the first is for the side that is shown first


def test_a_judge_that_is_always_sure_is_said(tmp_path):
    candidates(tmp_path, 5)
    with JudgeServer(biased(20.0, 0.0)) as server:
        err = judged(tmp_path, server, *SOFT)
    assert "100% of the probabilities are below 0.01 or above 0.99" in err
