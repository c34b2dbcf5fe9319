"""A server on loopback with files and batches as OpenAI's, which misbehaves on schedule.

A batch goes on by one state with each look at it. `paid` counts the requests that it has answered, by their text.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from urllib.parse import parse_qs, urlsplit

from helpers.judge_server import Special, choice
from helpers.loopback import Handler, Serving, body_of, cut, send

STATES = ("validating", "in_progress", "finalizing")


class BatchServer(Serving):
    """`decide(text)` gives an answer's text, or a Special response.

    `faults`: (step, number of its request, kind) of what goes wrong; steps are upload, submit, list, look, download,
    numbers begin at 1, and kinds are those of `_fault`. `ends`: how batch number n ends, `completed` by default; of one
    that is expired or cancelled `share` of the requests are answered. `on(step, when, handler)` is called for each
    request as it comes ("before") and when it is done, but not answered ("after").
    """

    def __init__(
        self,
        decide: Callable[[str], str | Special],
        faults: Iterable[tuple[str, int, str]] = (),
        ends: dict[int, str] | None = None,
        share: float = 0.5,
    ):
        super().__init__()
        self.decide, self.ends, self.share = decide, ends or {}, share
        self.faults = {(step, number): kind for step, number, kind in faults}
        self.on: Callable[[str, str, Handler], None] = lambda step, when, handler: None
        self.refuse: Callable[[dict], Special | None] = lambda batch: None  # of a new batch
        self.fail: Callable[[dict], dict | None] = lambda batch: None  # an error with which a batch fails
        self.files: dict[str, str] = {}
        self.batches: list[dict] = []
        self.paid: Counter = Counter()
        self.steps: Counter = Counter()
        self.counts = True  # whether batches have request_counts

    def lines_of(self, batch: dict) -> list[dict]:
        return [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]

    # --- requests

    def answer(self, handler) -> None:
        body = body_of(handler)
        target = urlsplit(handler.path)
        path, query = target.path.removeprefix("/v1"), parse_qs(target.query)
        step = self._step(handler.command, path)
        with self.lock:
            self.steps[step] += 1
            self.keys.add(handler.headers.get("Authorization", ""))
            kind = self.faults.get((step, self.steps[step]), "")
        self.on(step, "before", handler)
        if self._fault(handler, kind, acted=False):
            return
        with self.lock:
            found = getattr(self, f"_{step}")(path, query, body, handler) if step else Special(404, {"error": "no"})
        self.on(step, "after", handler)
        if self._fault(handler, kind, acted=True):
            return
        if isinstance(found, Special):
            send(handler, found.status, found.body, found.headers)
        elif isinstance(found, bytes):
            self._send_file(handler, found, kind)
        else:
            send(handler, 200, found)

    def _step(self, method: str, path: str) -> str:
        if path == "/files" and method == "POST":
            return "upload"
        if path == "/batches":
            return "submit" if method == "POST" else "list"
        if re.fullmatch(r"/batches/[^/]+", path):
            return "look"
        return "download" if re.fullmatch(r"/files/[^/]+/content", path) else ""

    def _fault(self, handler, kind: str, *, acted: bool) -> bool:
        """Whether the request is spoilt: 500, 429, drop and html before it is done, lost and lost-500 after that."""
        if kind == ("lost" if acted else "drop"):
            cut(handler)
        elif kind == ("lost-500" if acted else "500"):
            send(handler, 500, {"error": {"message": "oops"}})
        elif not acted and kind == "429":
            send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.1"})
        elif not acted and kind == "html":
            send(handler, 200, b"<html><title>Sign in</title></html>", kind="text/html")
        else:
            return False
        return True

    def _send_file(self, handler, content: bytes, kind: str) -> None:
        """A file, `truncated` within its connection, or `short` or `shorn`: cut at a line or within one."""
        lines = content.splitlines(keepends=True)
        if kind == "truncated":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            return cut(handler)
        if kind == "short":
            content = b"".join(lines[: len(lines) // 2])
        if kind == "shorn":
            content = content[: len(content) // 2 + 7]
        send(handler, 200, content, kind="application/octet-stream")
        return None

    # --- what they do

    def _upload(self, path, query, body: bytes, handler) -> dict:
        boundary = re.search(r"boundary=(\S+)", handler.headers["Content-Type"])[1].strip('"').encode()
        parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary) if b"\r\n\r\n" in part]
        fields = {
            re.search(rb'name="([^"]+)"', head)[1].decode(): text.removesuffix(b"\r\n") for head, _, text in parts
        }
        assert fields["purpose"] == b"batch"
        number = f"file-{len(self.files)}"
        self.files[number] = fields["file"].decode()
        return {"id": number, "object": "file", "purpose": "batch"}

    def _submit(self, path, query, body: bytes, handler) -> dict | Special:
        asked = json.loads(body)
        assert asked["endpoint"] == "/v1/chat/completions" and asked["completion_window"] == "24h"
        if refusal := self.refuse(asked):
            return refusal
        number = len(self.batches) + 1
        lines = self.lines_of(asked)
        assert len({line["custom_id"] for line in lines}) == len(lines)
        more = {"id": f"batch-{number}", "object": "batch", "created_at": int(time.time()), "status": STATES[0]}
        more["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
        self.batches.append(asked | more)
        return self._shown(self.batches[-1])

    def _list(self, path, query, body, handler) -> dict:
        newest = self.batches[::-1]
        names = [batch["id"] for batch in newest]
        start = names.index(query["after"][0]) + 1 if "after" in query else 0
        page = newest[start : start + 3]  # as servers do that have a limit of their own
        return {"object": "list", "data": [self._shown(b) for b in page], "has_more": start + 3 < len(newest)}

    def _look(self, path, query, body, handler) -> dict | Special:
        batch = next((b for b in self.batches if b["id"] == path.rpartition("/")[2]), None)
        if batch is None:
            return Special(404, {"error": {"message": "No such batch"}})
        shown = self._shown(batch)
        if batch["status"] in STATES:
            self._go_on(batch)
        return shown

    def _download(self, path, query, body, handler) -> bytes | Special:
        name = path.split("/")[2]
        return self.files[name].encode() if name in self.files else Special(404, {"error": {"message": "No such file"}})

    def _shown(self, batch: dict) -> dict:
        return {name: value for name, value in batch.items() if self.counts or name != "request_counts"}

    def _go_on(self, batch: dict) -> None:
        if error := self.fail(batch):
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
        elif batch["status"] != STATES[-1]:
            batch["status"] = STATES[STATES.index(batch["status"]) + 1]
        else:
            self._finish(batch)

    def _finish(self, batch: dict) -> None:
        lines, end = self.lines_of(batch), self.ends.get(int(batch["id"].rpartition("-")[2]), "completed")
        reached = len(lines) if end == "completed" else int(len(lines) * self.share)
        answers, errors = [], []
        for line in lines[:reached]:
            text = line["body"]["messages"][-1]["content"]
            said = self.decide(text)
            said = said if isinstance(said, Special) else choice(said)
            response = {"status_code": said.status, "request_id": "r", "body": said.body}
            entry = {"id": "batch_req", "custom_id": line["custom_id"], "response": response, "error": None}
            if said.status == 200:
                self.paid[text] += 1
                answers.append(entry)
            else:
                errors.append(entry)
        if end == "expired":
            error = {"code": "batch_expired", "message": "This request could not be executed in time."}
            for line in lines[reached:]:
                errors.append({"id": "batch_req", "custom_id": line["custom_id"], "response": None, "error": error})
        for name, found in (("output_file_id", answers), ("error_file_id", errors)):
            if found:
                batch[name] = f"{batch['id']}-{name}"
                self.files[batch[name]] = "".join(json.dumps(entry) + "\n" for entry in reversed(found))
        counts = {"total": len(lines), "completed": len(answers), "failed": len(errors)}
        batch |= {"status": end, "request_counts": counts}
