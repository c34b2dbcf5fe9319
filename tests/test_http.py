"""The HTTP client: connections that are kept, closed and given up, proxies, and addresses that are refused."""

import json
import socket
import threading
import time

import pytest

from dpoctl.errors import InputError
from dpoctl.runtime.http import Http, NoResponse, backoff_s
from helpers.loopback import Loopback, body_of, send


class Echo(Loopback):
    """Answers with the path and the body that were asked for; `hang` paths wait, `last` ones close the connection."""

    def __init__(self):
        super().__init__(self.echo, idle_s=0.4)
        self.lines = []

    def echo(self, handler):
        body = body_of(handler).decode()
        self.lines.append(f"{handler.path} {handler.headers.get('Authorization')}")
        if "hang" in handler.path:
            time.sleep(2)
        last = {"Connection": "close"} if "last" in handler.path else {}
        send(handler, 200, {"path": handler.path, "body": body}, last)


def test_a_connection_is_kept_and_replaced():
    with Echo() as server:
        http = Http(f"{server.url}/v1/", 5, "key")
        assert json.loads(http.get("/models").text)["path"] == "/v1/models"
        found = http.post("/completions", {"a": [1, 2]})
        assert (found.status, found.fresh, json.loads(json.loads(found.text)["body"])) == (200, False, {"a": [1, 2]})
        assert server.opened == 1 and server.lines[0] == "/v1/models Bearer key"
        assert http.get("/last").status == 200
        assert http.get("/again").fresh and server.opened == 2  # as the server asked
        time.sleep(0.8)
        assert http.get("/idle").fresh and server.opened == 3  # closed meanwhile, which is no error
        thread = threading.Thread(target=http.get, args=("/thread",))
        thread.start()
        thread.join()
        assert server.opened == 4
        http.close()


def test_what_gives_no_response():
    with Echo() as server:
        with pytest.raises(NoResponse, match="--timeout 0.2 s"):
            Http(server.url, 0.2).get("/hang")
        http = Http(server.url, 60)
        threading.Timer(0.2, http.abort).start()
        start = time.monotonic()
        with pytest.raises(NoResponse):
            http.get("/hang")
        assert time.monotonic() - start < 1.5
    with pytest.raises(NoResponse, match="ConnectionRefusedError"):
        Http(server.url, 5).get("/")


def test_a_proxy_but_not_for_this_machine(monkeypatch):
    with Echo() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "node7")
        assert json.loads(Http("http://gpu.example:8000/v1", 5).get("/models").text)["path"] == (
            "http://gpu.example:8000/v1/models"
        )
        with Echo() as server:
            assert json.loads(Http(server.url, 5).get("/here").text)["path"] == "/here"
        assert len(proxy.lines) == 1 and Http("http://node7:8000", 5).proxy == ""


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "ftp://x", "http://", "http://x:port", "http://me:secret@x/v1"),
        *("http://node..7:8000", "http://x/\u00fc"),
    ],
)
def test_an_address_that_is_refused(url):
    with pytest.raises(InputError) as error:
        Http(url, 5)
    assert "secret" not in str(error.value)


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown():
    assert Http("http://x", 5, "secret-key\n").key == "secret-key"
    for key in ("secret-\u2013key", "secret-\nkey"):
        with pytest.raises(InputError, match="the key in the environment") as error:
            Http("http://x", 5, key)
        assert "secret" not in str(error.value)


def test_a_machine_that_takes_no_connection(monkeypatch):
    monkeypatch.setattr("dpoctl.runtime.http._CONNECT_S", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]  # more than the machine lets wait
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        with pytest.raises(NoResponse, match=r"no connection within 0\.2 s"):
            Http(f"http://127.0.0.1:{full.getsockname()[1]}", 60).get("/")
        for each in waiting:
            each.close()


def test_waits_double_and_end():
    waits = [max(backoff_s(n) for _ in range(50)) for n in range(10)]
    assert 0.25 <= waits[0] <= 0.5 and 1 <= waits[2] <= 2 and 15 <= waits[9] <= 30
