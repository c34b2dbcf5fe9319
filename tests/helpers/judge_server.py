"""A chat-completions server on loopback that misbehaves on schedule, decided by each request's text."""

import hashlib
import json
import time
from collections import Counter
from typing import NamedTuple

from helpers.loopback import Serving, body_of, send


class Special(NamedTuple):
    """A response that is sent as it is: JSON, or a text such as a proxy's HTML page."""

    status: int
    body: dict | list | str
    headers: dict = {}


def choice(content, finish: str | None = "stop", usage: bool = True, **message) -> Special:
    """A response of status 200 with one choice."""
    made = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content} | message}
    counted = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110} if usage else None
    more = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": counted}
    return Special(200, more | {"choices": [made]})


class JudgeServer(Serving):
    """`faults` is a list of (share, kind); a request meets its fault the first time only, then the verdict.

    `decide(request)` gives the answer's text or None, or a Special response. `refuse(body)` gives a Special response to
    what a request's parameters are, or None. `served` counts the answers by request, `requests` all of them; `keys`
    holds the Authorization headers, `bodies` the requests in the order of their arrival.
    """

    def __init__(self, decide, faults=(), hang_s: float = 1.5, status: int | None = None, refuse=None):
        super().__init__()
        self.decide, self.faults, self.hang_s, self.status, self.refuse = decide, faults, hang_s, status, refuse
        self.bodies: list[dict] = []
        self.seen: set[str] = set()
        self.served: Counter = Counter()
        self.kinds: Counter = Counter()
        self.requests = 0

    def fault_of(self, text: str) -> str | None:
        with self.lock:
            first = text not in self.seen
            self.seen.add(text)
        if not first:
            return None
        place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8
        for share, kind in self.faults:
            if place < share:
                return kind
            place -= share
        return None

    def answer(self, handler) -> None:
        body = json.loads(body_of(handler))
        text = body["messages"][-1]["content"]
        with self.lock:
            self.requests += 1
            self.bodies.append(body)
            self.keys.add(handler.headers.get("Authorization", ""))
        if self.status:
            sent = handler.headers.get("Authorization", "")  # a careless server repeats what it was sent
            return self.send(handler, self.status, {"error": {"message": f"no: {sent}", "type": "x"}})
        kind = self.fault_of(text)
        with self.lock:
            self.kinds[kind] += 1
        if kind == "429":
            return self.send(handler, 429, {"error": {"message": "slow down"}})
        if kind == "429-after":
            return self.send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"})
        if kind == "500":
            return self.send(handler, 500, {"error": {"message": "oops"}})
        if kind == "hang":
            time.sleep(self.hang_s)
            return self.send(handler, 200, {})
        if kind == "broken":
            return self.send(handler, 200, None)
        said = self.refuse(body) if self.refuse else None
        said = said or self.decide(text)
        if isinstance(said, Special) and said.status != 200:
            return self.send(handler, *said)
        with self.lock:
            self.served[text] += 1
        self.send(handler, *(said if isinstance(said, Special) else choice(said)))

    def send(self, handler, status: int, data, headers=()) -> None:
        if data is None:
            data = b'{"id": "1", "choices": [{"mess'
        if isinstance(data, str):
            send(handler, status, data.encode(), headers, "text/html")
        else:
            send(handler, status, data, headers)
