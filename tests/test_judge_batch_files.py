"""judge --batch-files: requests that are written for another program, whose answers a rerun collects."""

import json
import re
from pathlib import Path

import pytest

from helpers.judge_server import JudgeServer, Special, choice
from helpers.judging import candidates, likes_good, manifest, rows_of, run
from helpers.server_replies import error

pytestmark = pytest.mark.usefixtures("warm_judge")

TOO_LONG = error("This model's maximum context length is 64 tokens. However, you requested 90 tokens.")


def asked(folder: Path, *args: str, code: int = 0) -> str:
    more = ["--model", "org/m", "--batch-files", "batch", "--out", "j.jsonl", *args]
    return " ".join(run(folder, "a.jsonl", "b.jsonl", *more, code=code)[1].split())


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_batch(folder: Path, number: int, decide, cut: int = 0) -> list[dict]:
    """Answer a file of requests in vLLM's form, with errors whose responses have no body; returns the requests."""
    requests = lines_of(folder / f"batch/requests-{number:04d}.jsonl")
    lines = []
    for request in requests:
        said = decide(request["body"]["messages"][-1]["content"])
        said = said if isinstance(said, Special) else choice(said)
        body, told = (said.body, None) if said.status == 200 else (None, said.body)
        response = {"status_code": said.status, "request_id": "r", "body": body}
        lines.append(
            json.dumps({"id": "vllm-1", "custom_id": request["custom_id"], "response": response, "error": told})
        )
    text = "\n".join(lines) + "\n"
    (folder / f"batch/answers-{number:04d}.jsonl").write_text(text[: len(text) - cut])
    return requests


def test_requests_are_written_and_answers_collected(tmp_path):
    """One text is too long, one request fails and is asked for again; the rows are those of single calls."""
    candidates(tmp_path, 6)
    too_long = Special(400, TOO_LONG)

    def decide(text: str):
        return too_long if "Question 2?" in text else likes_good(text)

    with JudgeServer(decide) as server:
        run(tmp_path, "a.jsonl", "b.jsonl", "--model", "org/m", "--base-url", server.url, "--out", "s.jsonl")
    said = asked(tmp_path, code=75)
    command = "vllm run-batch -i batch/requests-0001.jsonl -o batch/answers-0001.jsonl --model org/m"
    assert f"to run: {command}" in said and "12 requests wait for answers: batch: requests-0001.jsonl hint:" in said
    assert command in asked(tmp_path, code=75)  # said again, and nothing is written twice
    assert [p.name for p in (tmp_path / "batch").iterdir()] == ["requests-0001.jsonl"]
    broken = Special(500, error("Engine died."))
    requests = run_batch(tmp_path, 1, lambda text: broken if "Question 4?" in text else decide(text))
    assert {(r["method"], r["url"]) for r in requests} == {("POST", "/v1/chat/completions")}
    assert {json.dumps({k: v for k, v in r["body"].items() if k != "messages"}) for r in requests} == {
        '{"model": "org/m", "max_tokens": 1024, "temperature": 0.0}'
    }
    said = asked(tmp_path, code=75)
    assert "2 requests wait for answers: batch: requests-0002.jsonl" in said
    assert len(run_batch(tmp_path, 2, decide)) == 2
    asked(tmp_path)
    assert [row | {"raw": ""} for row in rows_of(tmp_path / "j.jsonl")] == [
        row | {"raw": ""} for row in rows_of(tmp_path / "s.jsonl")
    ]
    assert [row["reason"] for row in rows_of(tmp_path / "j.jsonl") if row["prompt_id"] == "p2"] == [
        "too long for the judge"
    ] * 2
    cost = manifest(tmp_path)["cost"]
    assert (cost["prompt_tokens"], cost["completion_tokens"], cost["batched"]) == (1000, 100, 10)


def test_a_file_that_is_still_being_written_is_waited_for(tmp_path):
    candidates(tmp_path, 3)
    asked(tmp_path, code=75)
    run_batch(tmp_path, 1, likes_good, cut=200)
    said = asked(tmp_path, code=75)
    assert "1 damaged lines: is it still being written?" in said and "1 requests wait for answers" in said
    assert not (tmp_path / "batch/requests-0002.jsonl").exists()
    run_batch(tmp_path, 1, likes_good)
    asked(tmp_path)
    assert {row["verdict"] for row in rows_of(tmp_path / "j.jsonl")} == {"a"}


def test_a_parameter_is_learnt_from_answers(tmp_path):
    candidates(tmp_path, 2)
    wrong = Special(400, error("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", param="max_tokens"))
    asked(tmp_path, code=75)
    run_batch(tmp_path, 1, lambda text: wrong)
    asked(tmp_path, code=75)
    (request, *_) = run_batch(tmp_path, 2, likes_good)
    assert request["body"]["max_completion_tokens"] == 1024
    asked(tmp_path)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            404,
            error("The model `org/m` does not exist."),
            r"batch/answers-0001.jsonl: 4 of 4 requests are refused: 404",
        ),
        (400, TOO_LONG, r"so it did with all 4 requests .*texts that are refused can be left out"),
    ],
)
def test_answers_that_are_all_errors_stop_the_command(status, body, said, tmp_path):
    candidates(tmp_path, 2)
    asked(tmp_path, code=75)
    run_batch(tmp_path, 1, lambda text: Special(status, body))
    assert re.search(said, asked(tmp_path, code=2))
    run_batch(tmp_path, 1, likes_good)
    asked(tmp_path)


def test_what_has_no_effect_with_files(tmp_path):
    candidates(tmp_path, 2)
    for more in (["--base-url", "http://x/v1"], ["--batch"], ["--concurrency", "3"], ["--price-in", "1"]):
        assert f"{more[0]} has no effect with --batch-files" in asked(tmp_path, *more, code=2)
    assert "--batch-poll has no effect without --batch" in run(
        tmp_path, "a.jsonl", "b.jsonl", "--model", "m", "--batch-poll", "3", "--out", "j.jsonl", code=2
    )[1].replace("\n", " ")
    (tmp_path / "batch").write_text("x")
    assert "--batch-files batch: is a file" in asked(tmp_path, code=2)
