"""A server on loopback that generates as vLLM's or SGLang's does, and misbehaves on schedule.

Its answers are a function of the request and of `weights`, so that equal requests get equal answers from any process.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property

from helpers.loopback import Loopback, body_of, cut, send

Sampled = tuple[list[int], str]  # token ids, finish
FAULTS = ("500", "429", "closed", "garbage", "no ids", "late")


def numbers(*parts: object) -> int:
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12], 16)


class GenerationServer:
    """`kind` is vllm or sglang; `folder` holds the tokenizer of what it serves under `name`, loaded from `root`.

    `faults`: (share, kind) of requests that meet a fault the first time they are made. `sample(server, ids,
    parameters)` gives the answer. `restarts`: after so many answers the server goes away for `away_s` and comes back
    with these attributes changed. `served` counts the answers that were sent by prompt and seed.
    """

    def __init__(self, folder, name="model", root=None, *, kind="vllm", faults=(), sample=None, **more):
        self.folder, self.name, self.root, self.kind = str(folder), name, str(root or folder), kind
        self.faults, self.sample = tuple(faults), sample or drawn
        self.weights, self.version, self.context, self.vocabulary = "w", "0.32.0", 512, 200
        self.others: tuple[str, ...] = ()  # further models
        self.late_s, self.delay_s, self.away_s = 1.5, 0.0, 0.3
        self.restarts: dict[int, dict] = {}
        self.status, self.needs_key, self.tokenizes, self.spoil = 0, "", True, lambda data: data
        for key, value in more.items():
            assert hasattr(self, key)
            setattr(self, key, value)
        self.seen: set[str] = set()
        self.served: Counter = Counter()
        self.kinds: Counter = Counter()
        self.bodies: list[dict] = []
        self.probes: list[dict] = []
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.loopback = Loopback(lambda handler: (self.get if handler.command == "GET" else self.post)(handler))

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @property
    def url(self) -> str:
        return f"{self.loopback.url}/v1"

    @property
    def port(self) -> int:
        return self.loopback.port

    @property
    def connections(self) -> set:
        return self.loopback.connections

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def start(self) -> None:
        self.going = False
        self.loopback.start()

    def stop(self) -> None:
        self.loopback.stop()

    def restart(self, **changes) -> None:
        self.stop()
        time.sleep(self.away_s)
        for key, value in changes.items():
            setattr(self, key, value)
        self.start()

    # --- what it says of itself

    def get(self, handler) -> None:
        path = handler.path
        card = {"id": self.name, "object": "model", "root": self.root, "max_model_len": self.context}
        card["owned_by"] = self.kind
        cards = [card, *({"id": other, "object": "model", "root": other} for other in self.others)]
        found: dict[str, dict] = {"/v1/models": {"object": "list", "data": cards}}
        if self.kind == "vllm":
            found["/version"] = {"version": self.version}
        if self.kind == "sglang":
            found["/get_model_info"] = {"model_path": self.root, "weight_version": self.weights}
            found["/get_server_info"] = {"version": self.version, "context_length": self.context}
        if not self.admitted(handler):
            return
        send(handler, *((200, found[path]) if path in found else (404, {"detail": "Not Found"})))

    def admitted(self, handler) -> bool:
        sent = handler.headers.get("Authorization", "")
        self.keys.add(sent)
        if self.status or (self.needs_key and sent != f"Bearer {self.needs_key}"):
            send(handler, self.status or 401, {"error": {"message": f"no: {sent}", "type": "x"}})
            return False
        return True

    # --- answers

    def post(self, handler) -> None:
        body = json.loads(body_of(handler))
        if not self.admitted(handler):
            return
        if handler.path == "/tokenize" and self.tokenizes:
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return send(handler, 200, {"tokens": ids, "count": len(ids), "max_model_len": self.context})
        if handler.path != ("/generate" if self.kind == "sglang" else "/v1/completions"):
            return send(handler, 404, {"detail": "Not Found"})
        if self.kind == "vllm" and body["model"] not in (self.name, *self.others):
            message = f"The model `{body['model']}` does not exist."
            return send(handler, 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}})
        with self.lock:
            (self.probes if is_probe(body) else self.bodies).append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.answer(handler, body)
        finally:
            with self.lock:
                self.in_flight -= 1

    def answer(self, handler, body: dict) -> None:
        ids, parameters = parameters_of(body)
        key = json.dumps([ids, parameters["seed"]])
        kind = None if is_probe(body) else self.fault_of(key)
        with self.lock:
            self.kinds[kind] += 1
        if kind == "500":
            return send(handler, 500, {"error": {"message": "oops", "type": "InternalServerError"}})
        if kind == "429":
            return send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.1"})
        if kind == "closed":
            return cut(handler)
        if kind == "garbage":
            return send(handler, 200, b'{"id": "1", "choices": [{"te')
        if kind == "late":
            time.sleep(self.late_s)
        time.sleep(self.delay_s)
        sampled, finish = self.sample(self, ids, parameters)
        data = self.sglang(ids, sampled, finish) if self.kind == "sglang" else self.vllm(ids, sampled, finish)
        if kind == "no ids":
            where = data if self.kind == "sglang" else data["choices"][0]
            del where["output_ids" if self.kind == "sglang" else "token_ids"]
        data = self.spoil(data)
        with self.lock:  # after the answer at which it goes away there is no other
            if self.going:
                return cut(handler)
            if send(handler, 200, data) and kind is None and not is_probe(body):
                self.served[key] += 1
                changes = self.restarts.pop(self.served.total(), None)
                if changes is not None:
                    self.going = True
                    threading.Thread(target=self.restart, kwargs=changes, daemon=True).start()

    def fault_of(self, key: str) -> str | None:
        with self.lock:
            first = key not in self.seen
            self.seen.add(key)
        place = numbers("fault", key) / 16**12
        for share, kind in self.faults if first else ():
            if place < share:
                return kind
            place -= share
        return None

    def logps(self, ids: list[int]) -> list[float]:
        return [-1 - 3 * numbers(self.weights, ids[:i]) / 16**12 for i in range(1, len(ids))]

    def vllm(self, ids: list[int], sampled: list[int], finish: str) -> dict:
        logps = [None, *({str(id): {"logprob": p}} for id, p in zip(ids[1:], self.logps(ids), strict=True))]
        choice = {"index": 0, "text": "", "finish_reason": finish, "token_ids": sampled, "prompt_token_ids": ids}
        counted = {"prompt_tokens": len(ids), "completion_tokens": len(sampled)}
        choice |= {"prompt_logprobs": logps, "logprobs": {"token_logprobs": [-1.0] * len(sampled)}}
        return {"id": "1", "object": "text_completion", "model": self.name, "choices": [choice], "usage": counted}

    def sglang(self, ids: list[int], sampled: list[int], finish: str) -> dict:
        how = {"type": finish} | ({"matched": sampled[-1]} if finish == "stop" else {"length": len(sampled)})
        about = {"id": "1", "finish_reason": how, "prompt_tokens": len(ids), "completion_tokens": len(sampled)}
        about["input_token_logprobs"] = [[None, ids[0], None], *([p, 0, None] for p in self.logps(ids))]
        about["output_token_logprobs"] = [[-1.0, id, None] for id in sampled]
        return {"text": "", "output_ids": sampled, "meta_info": about}


def is_probe(body: dict) -> bool:
    """Whether a request asks for the log-probs of its prompt, too."""
    return "prompt_logprobs" in body or "logprob_start_len" in body


def parameters_of(body: dict) -> tuple[list[int], dict]:
    """(prompt ids, parameters by vLLM's names) of a request to either server."""
    if "prompt" in body:
        return body["prompt"], body
    given = body["sampling_params"]
    return body["input_ids"], given | {"max_tokens": given["max_new_tokens"], "seed": given["sampling_seed"]}


def drawn(server: GenerationServer, ids: list[int], parameters: dict) -> Sampled:
    """Ids drawn from a hash of the request; one in ten ends the answer."""
    seed = parameters["seed"] if parameters["temperature"] > 0 else 0
    found: list[int] = []
    while len(found) < parameters["max_tokens"]:
        number = numbers(server.weights, seed, ids, len(found))
        if number % 10 == 0 and parameters["stop_token_ids"]:
            return [*found, parameters["stop_token_ids"][0]], "stop"
        id = number % server.vocabulary
        found.append(id if id not in parameters["stop_token_ids"] else id + 1)
    return found, "length"


def greedy(model) -> Callable[[GenerationServer, list[int], dict], Sampled]:
    """The most likely tokens of a model, by plain forward passes."""
    import torch

    lock = threading.Lock()

    def sample(server: GenerationServer, ids: list[int], parameters: dict) -> Sampled:
        assert parameters["temperature"] == 0
        found: list[int] = []
        with lock, torch.no_grad():
            while len(found) < parameters["max_tokens"]:
                found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
                if found[-1] in parameters["stop_token_ids"]:
                    return found, "stop"
        return found, "length"

    return sample
