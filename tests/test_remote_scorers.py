"""SCORER = http://...: protocol, retries, refusals, a server that goes away, resuming; against a loopback server."""

import json
import signal
import threading
import time

import pytest

from dpoctl.cli.app import run as command_line
from dpoctl.config.scorer import parse_scorer
from dpoctl.errors import InputError, Interrupted
from dpoctl.inference import remote_scorer
from dpoctl.inference.scorers import ScorerOptions, load_scorer
from dpoctl.runtime import http, signals
from helpers.judging import rows_of, write
from helpers.loopback import Serving, body_of, cut, send

ROWS = [
    {"prompt_id": f"p{i}", "prompt": f"P{i}", "completion": "word " * (i % 7), "finish": "stop"} for i in range(100)
]


class RewardServer(Serving):
    """Scores by the number of words. `replies`: what is sent in place of the first scores, (status, text) each, None to
    close the connection. `scored` counts the rows by prompt."""

    path = "/score"

    def __init__(self, replies=(), wait_s: float = 0.0):
        super().__init__()
        self.replies, self.wait_s = list(replies), wait_s
        self.scored: dict[str, int] = {}
        self.paths: set[str] = set()

    def answer(self, handler) -> object:
        rows = json.loads(body_of(handler))["rows"]
        time.sleep(self.wait_s)
        with self.lock:
            self.paths.add(handler.path)
            self.keys.add(handler.headers.get("Authorization", ""))
            reply = self.replies.pop(0) if self.replies else ...
            if reply is ...:
                for row in rows:
                    self.scored[row["prompt"]] = self.scored.get(row["prompt"], 0) + 1
        if reply is None:
            return cut(handler)
        status, text = (
            (200, json.dumps({"scores": [len(r["completion"].split()) for r in rows]})) if reply is ... else reply
        )
        send(handler, status, text.encode())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote_scorer, "backoff_s", lambda attempt: 0.01)
    monkeypatch.setattr(http, "_POLL_S", 0.01)


def test_rows_go_out_and_numbers_come_back(monkeypatch):
    monkeypatch.setenv(remote_scorer.KEY, "secret-of-the-reward-server")
    with RewardServer() as server:
        scorer = load_scorer(server.url)
        scores = scorer.score(ROWS)
        assert scores.values == scores.keys == [float(i % 7) for i in range(100)]
        assert server.scored == {f"P{i}": 1 for i in range(100)} and server.paths == {"/score"}
        assert server.keys == {"Bearer secret-of-the-reward-server"}
        assert not scorer.remote.http.open  # a long PPO run scores thousands of times
        load_scorer(server.url + "/").score(ROWS[:1])
        assert "/score/" in server.paths


def test_transient_failures_are_retried_and_no_row_is_scored_twice():
    replies = [(500, "oops"), None, (429, "{}"), (503, "<html><title>down</title></html>"), None]
    with RewardServer(replies) as server:
        assert load_scorer(server.url).score(ROWS).values == [float(i % 7) for i in range(100)]
        assert set(server.scored.values()) == {1}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, '{"scores": [1, 2]}'), "returned 2 scores for 3 rows, the first of them prompt_id p0"),
        ((200, '{"scores": [1, NaN, 2]}'), "the scorer gave nan for prompt_id p1"),
        ((200, '{"scores": [1, null, 2]}'), "expected a number, got None for prompt_id p1"),
        ((200, '{"scores": [1, true, 2]}'), "expected a number, got True for prompt_id p1"),
        ((200, "[1, 2, 3]"), "expected an object with a list 'scores', got '[1, 2, 3]'"),
        ((200, "<html>proxy</html>"), "expected an object with a list 'scores', got '<html>proxy</html>'"),
        ((404, '{"detail": "Not Found"}'), "refuses the request: 404 (Not Found)"),
        ((422, '{"detail": [{"loc": ["body", "rows"], "msg": "missing"}]}'), "422 (body.rows: missing)"),
    ],
)
def test_wrong_answers_are_refused(reply, said):
    with RewardServer([reply] * 9) as server, pytest.raises(InputError) as e:
        load_scorer(server.url).score(ROWS[:3])
    assert said in e.value.message


def test_a_server_that_is_down_or_goes_away(monkeypatch):
    monkeypatch.setattr(remote_scorer, "_RETRIES", 1)
    with RewardServer() as server:
        scorer = load_scorer(server.url)
        scorer.score(ROWS[:3])
        server.replies = [(503, "busy")] * 9
        with pytest.raises(Interrupted, match="does not answer any more: status 503"):
            scorer.score(ROWS[:3])
    with pytest.raises(InputError, match="does not answer: ConnectionRefusedError"):
        load_scorer(server.url).score(ROWS[:3])


def test_a_signal_stops_the_requests_in_flight(monkeypatch):
    with RewardServer(wait_s=5) as server:
        scorer = load_scorer(server.url)
        threading.Timer(0.1, lambda: setattr(signals.stop, "signal", signal.SIGTERM.name)).start()
        start = time.monotonic()
        try:
            with pytest.raises(Interrupted, match="SIGTERM"):
                scorer.score(ROWS)
        finally:
            signals.stop.signal = ""
        assert time.monotonic() - start < 4


def test_after_a_signal_nothing_more_is_sent(monkeypatch):
    """A thread that waits between two attempts must not make another one: the server might not answer for minutes."""
    monkeypatch.setattr(remote_scorer, "backoff_s", lambda attempt: 30.0)
    with RewardServer([(503, "busy")] * 9) as server:
        threading.Timer(0.3, lambda: setattr(signals.stop, "signal", signal.SIGTERM.name)).start()
        try:
            with pytest.raises(Interrupted, match="SIGTERM"):
                load_scorer(server.url).score(ROWS)
        finally:
            signals.stop.signal = ""
        assert len(server.replies) == 5  # one attempt of each of four requests


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://", "not an address"),
        ("http:/host", "not an address"),
        ("https://host:port/x", "not an address"),
        ("http://user:pa55@host/x", "an address with a password"),
        ("http://host/x?key=1", "an address with a query"),
    ],
)
def test_malformed_addresses_are_refused(text, said):
    with pytest.raises(InputError) as e:
        parse_scorer(text)
    assert said in e.value.message and "pa55" not in e.value.message


def test_the_notation():
    spec = parse_scorer("http://host:8000/score")
    assert (spec.kind, spec.inputs, spec.variant) == ("remote", (), "http://host:8000/score")
    with pytest.raises(InputError, match="never the completion alone"):
        load_scorer("http://host/x", ScorerOptions(text="completion"))


def test_a_command_resumes_where_the_server_went_away(tmp_path, monkeypatch, capsys):
    """The rows of complete batches are not scored again, and another address is another output."""
    from dpoctl.stages import score

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(score, "_BATCH", 10)
    monkeypatch.setattr(remote_scorer, "_RETRIES", 0)
    write(tmp_path / "rows.jsonl", ROWS)

    def run(url: str, code: int) -> str:
        capsys.readouterr()
        assert command_line(f"score --data rows.jsonl --scorer {url} --out scored.jsonl".split()) == code
        return capsys.readouterr().err

    with RewardServer([...] * 4 + [(503, "busy")]) as server:
        assert "rerun the command to resume" in run(server.url, 75)
        assert "--scorer http" in run(server.url + "2", 2)
        run(server.url, 0)
        assert server.scored == {f"P{i}": 1 for i in range(100)}
    assert [row["score"] for row in rows_of(tmp_path / "scored.jsonl")] == [float(i % 7) for i in range(100)]
    run(server.url, 0)  # complete: the server is not asked
