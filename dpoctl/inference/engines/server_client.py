"""A client of a server that generates: which model it serves, retries, and a probe that notices another model."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from ...errors import InputError
from ...runtime import signals
from ...runtime.http import Http, NoResponse, Response, backoff_s, retry_after_s, without_key
from ...runtime.server_errors import TRANSIENT, ServerError, error_in, read_error, status_of
from ..options import EngineOptions
from .engine import Sampled
from .server_protocols import BadAnswer, BrokenOff, Completions, Generate, Protocol, Request

_RESTARTING = (502, 503, 504)  # a proxy's answers for a server that is away, and may come back with another model
_POLL_S = 0.2  # how often signals are looked for while waiting
_SAME_MODEL = 0.25  # nats per token; rounding in bfloat16 moves a log-prob by hundredths
_KEY_HINT = "the key comes from DPOCTL_API_KEY, else from OPENAI_API_KEY"
_HINTS = {
    401: _KEY_HINT,
    403: _KEY_HINT,
    404: "check --base-url, which mostly ends in /v1, and --served-model",
    400: "the server's limits: its --max-model-len holds prompt and --max-new-tokens; vLLM's temperature is at most 2",
}
T = TypeVar("T")


class Pending(Exception):
    """The server gave no usable answer for a transient reason, as often as it was asked; it can be asked again."""


class AnotherModel(InputError):
    """The server's model is not the one that it had at the start."""


class _Transient(Exception):
    """A failed attempt; `wait_s` is what the server asks to wait. `answered`: with what is no answer to the request."""

    def __init__(self, reason: str, wait_s: float = 0.0, *, answered: bool = False):
        super().__init__(reason)
        self.wait_s, self.answered = wait_s, answered


@dataclass(frozen=True)
class Served:
    """What a server says of itself: its kind and version, and of the model its name, where it comes from, its context.

    `root` is the directory or hub id that the server loaded, `weights` the version of its weights; "" where it does not
    say.
    """

    server: str
    model: str
    root: str
    context: int | None
    weights: str = ""

    def settings(self) -> dict[str, str]:
        """What an output keeps from its start, in words."""
        context = "" if self.context is None else str(self.context)
        named = {"version": self.server, "model": self.model, "model path": self.root}
        named |= {"context": context, "weights": self.weights}
        return {name: value for name, value in named.items() if value}


class ServerClient:
    """Asks one server, from several threads. `open` comes first.

    `counts`: requests that were answered, and retries. No file and no message contains the key, which comes from the
    environment.
    """

    def __init__(self, options: EngineOptions, vocabulary: int):
        self.options, self.vocabulary = options, vocabulary
        self.url = (options.base_url or "").rstrip("/")
        key = os.environ.get("DPOCTL_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        root = self.url.removesuffix("/v1")
        self.http, self.api = Http(root, options.timeout, key), self.url[len(root) :]
        self.protocol: Protocol = Completions()
        self.served = Served("", "", "", None)
        self.probe: list[float] = []  # log-probs of the probe's tokens; empty where the server gives none
        self.counts = {"asked": 0, "retries": 0}
        self.stopped, self.reason = threading.Event(), "stopped"
        self._lock, self._verifying = threading.Lock(), threading.Lock()
        self._lost, self._verified = 0, 0  # connections that were lost, and how many of them before the last probe
        self._probed: Request | None = None

    # --- what is served

    def open(self, probe: Request) -> None:
        """Find out what is served, and check that it answers the probe with token ids.

        Raises InputError for a server that does not and a model that it does not serve, Pending where it is away.
        """
        self.served = self._retried(self._identify)
        if self.served.context is not None:
            probe = replace(probe, ids=probe.ids[: max(1, self.served.context - 1)])
        self._probed = probe
        if self.served.server.startswith("sglang"):
            self.protocol = Generate()
        self.probe = self._retried(lambda: self._probe(probe), patient=False)
        self._verified = self._lost

    def verify(self) -> None:
        """Notice another model behind the same address. Raises InputError, and Pending where the server is away."""
        lost, probe = self._lost, self._probed
        assert probe is not None
        served = self._retried(self._identify)
        if served != self.served:
            raise self._another(_difference(self.served, served))
        self.require_same_probe(self._retried(lambda: self._probe(probe)))
        self._verified = lost

    def require_same_probe(self, probe: list[float]) -> None:
        """Raise InputError where the log-probs of the probe show another model than at the start."""
        if not probe or not self.probe:
            return
        if len(probe) != len(self.probe):
            raise self._another(f"it counts {len(probe) + 1} tokens in the probe, before it was {len(self.probe) + 1}")
        drift = sum(abs(a - b) for a, b in zip(probe, self.probe, strict=True)) / len(probe)
        if drift > _SAME_MODEL:
            raise self._another(f"the log-probs of the same text differ by {drift:.2f} nats per token")

    def _another(self, what: str) -> AnotherModel:
        return AnotherModel(
            f"--base-url {self.url}: the server has another model than at the start: {what}",
            hint="serve the same model again and rerun the command; or restart with --overwrite",
        )

    def _identify(self) -> Served:
        response = self._send("GET", f"{self.api}/models")
        if response.status == 404 and not self.api:
            self.api = "/v1"
            response = self._send("GET", "/v1/models")
        cards = _object(self._checked(response)).get("data")
        named = {str(c.get("id")): c for c in cards if isinstance(c, dict)} if isinstance(cards, list) else {}
        card = self._chosen(named)
        version = None if card.get("owned_by") == "sglang" else self._optional("/version").get("version")
        about = {} if version else self._sglang()
        server = f"vllm {version}" if version else f"sglang {about.get('version', '')}".strip() if about else "unknown"
        root = card.get("root") or about.get("model_path") or ""
        of_base = named.get(str(card.get("parent")), {})  # an adapter's own card has no length
        lengths = (card.get("max_model_len"), of_base.get("max_model_len"), about.get("context_length"))
        return Served(
            server,
            str(card.get("id")),
            str(root),
            next((length for length in lengths if isinstance(length, int)), None),
            str(about.get("weight_version") or ""),
        )

    def _chosen(self, cards: dict[str, dict[str, Any]]) -> dict[str, Any]:
        name, names = self.options.served_model, ", ".join(cards)
        if not cards:
            raise InputError(f"--base-url {self.url}: the server lists no model", hint=_HINTS[404])
        if name is None and len(cards) > 1:
            raise InputError(
                f"--base-url {self.url}: it serves several models: {names}", hint="choose one: --served-model NAME"
            )
        if name is not None and name not in cards:
            raise InputError(f"--served-model {name}: not served at {self.url}", hint=f"it serves {names}")
        return cards[name] if name is not None else next(iter(cards.values()))

    def _sglang(self) -> dict[str, Any]:
        """What SGLang says of itself; empty for another server."""
        about = self._optional("/model_info") or self._optional("/get_model_info")
        if "model_path" not in about:
            return {}
        return self._optional("/server_info") | self._optional("/get_server_info") | about

    def _optional(self, path: str) -> dict[str, Any]:
        """What a path says that not every server has."""
        response = self._send("GET", path)
        try:
            return _object(json.loads(response.text)) if response.status == 200 else {}
        except (ValueError, _Transient):
            return {}

    def _probe(self, probe: Request) -> list[float]:
        """The log-probs of the probe's tokens. The response is checked as every answer is."""
        body = self.protocol.body(probe, self.served.model, of_prompt=True)
        response = self._send("POST", self._path, body)
        if response.status in (400, 422, 501):  # the server gives no log-probs of prompts
            response = self._send("POST", self._path, self.protocol.body(probe, self.served.model))
        data = self._checked(response)
        self._read(data, probe)
        try:
            return self.protocol.prompt_logps(data)
        except BadAnswer:
            return []

    def tokenize(self, text: str) -> list[int] | None:
        """The server's token ids of a text, without special tokens around it; None where it does not tell."""

        def attempt() -> list[int] | None:
            body = {"model": self.served.model, "prompt": text, "add_special_tokens": False}
            response = self._send("POST", "/tokenize", body)
            if response.status in (400, 401, 403, 404, 405, 422, 501):
                return None
            tokens = _object(self._checked(response)).get("tokens")
            return tokens if isinstance(tokens, list) else None

        return self._retried(attempt)

    # --- answers

    def ask(self, request: Request) -> Sampled:
        """The server's answer. Raises Pending, and InputError for what no retry can mend."""

        def attempt() -> Sampled:
            self._settle()
            response = self._send("POST", self._path, self.protocol.body(request, self.served.model))
            found = self._read(self._checked(response), request)
            if response.fresh:  # it may lead to a server that was started since; an older connection does not
                self._settle()
            return found

        found = self._retried(attempt)
        with self._lock:
            self.counts["asked"] += 1
        return found

    def stop(self) -> None:
        """Send no further request; those in flight are not repeated."""
        self.stopped.set()

    def abort(self) -> None:
        """Give up the requests in flight."""
        self.stopped.set()
        self.http.abort()

    @property
    def _path(self) -> str:
        return self.protocol.path if isinstance(self.protocol, Generate) else self.api + self.protocol.path

    def _settle(self) -> None:
        """After a lost connection: verify the model before anything else that the server says is believed."""
        if self._lost == self._verified:
            return
        with self._verifying:
            if self._lost != self._verified:
                self._go_on()
                try:
                    self.verify()
                except Pending as e:
                    self.reason = str(e)
                    self.stop()  # else every thread would wait for the server in turn
                    raise

    def _read(self, data: dict[str, Any], request: Request) -> Sampled:
        named = data.get("model", self.served.model)
        if isinstance(self.protocol, Completions) and named != self.served.model:
            raise self._another(f"an answer of model {named}, not of {self.served.model}")
        try:
            return self.protocol.read(data, request, self.vocabulary)
        except BrokenOff as e:
            raise _Transient(str(e)) from None
        except BadAnswer as e:
            raise _Transient(f"an answer {e}", answered=True) from None

    # --- requests

    def _go_on(self) -> None:
        """Raise Pending where no further request may be sent, and in the main thread Interrupted at a signal."""
        if threading.current_thread() is threading.main_thread():
            signals.at_boundary("the batches before, which are kept")
        if self.stopped.is_set():
            raise Pending(self.reason)

    def _retried(self, attempt: Callable[[], T], *, patient: bool = True) -> T:
        """The result of an attempt, repeated after transient failures; `patient`: after unusable answers, too."""
        n = 0
        while True:
            self._go_on()
            try:
                return attempt()
            except _Transient as e:
                if e.answered and (n >= self.options.retries or not patient):
                    raise self._unusable(str(e)) from None
                if n >= self.options.retries:
                    raise Pending(str(e)) from None
                with self._lock:
                    self.counts["retries"] += 1
                self._pause(max(e.wait_s, backoff_s(n)))
            n += 1

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.stopped.wait(min(left, _POLL_S)):
            self._go_on()

    def _unusable(self, reason: str) -> InputError:
        return InputError(
            f"--base-url {self.url}: the server sends {reason}",
            hint="it must take token ids and return those it samples, as vllm serve does with return_token_ids, and "
            "SGLang's /generate; text is never tokenized again",
        )

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Response:
        """A response of any status that is not transient. Raises _Transient."""
        try:
            response = self.http.get(path) if body is None else self.http.post(path, body)
        except NoResponse as e:
            self._lose()
            raise _Transient(without_key(str(e), self.http.key)) from None
        if response.status >= 400 and self._error(response).kind == TRANSIENT and response.status != 501:
            if response.status in _RESTARTING:
                self._lose()
            raise _Transient(f"status {self._error(response)}", retry_after_s(response.headers))
        return response

    def _lose(self) -> None:
        with self._lock:
            self._lost += 1

    def _error(self, response: Response) -> ServerError:
        return error_in(response.status, response.text, self.http.key)

    def _checked(self, response: Response) -> dict[str, Any]:
        """The JSON object in a response of status 200. Raises InputError for another status, _Transient for garbage."""
        if response.status == 200:
            found = _object(response.text)
            if not found.get("error"):
                return found
            error = read_error(status_of(found["error"]), found)
            raise _Transient(f"an error in a response of status 200: {without_key(str(error), self.http.key)}")
        if 300 <= response.status < 400:
            to = response.headers.get("location", "another address")
            raise InputError(f"--base-url {self.url}: the server redirects to {to}", hint="give that address")
        hint = _HINTS.get(response.status, _HINTS[400])
        raise InputError(f"--base-url {self.url}: the server refuses the request: {self._error(response)}", hint)


def _object(text: Any) -> dict[str, Any]:
    """The JSON object in a text. Raises _Transient for anything else."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _Transient("a response that is no JSON object")
    return found


def _difference(before: Served, now: Served) -> str:
    old, new = asdict(before), asdict(now)
    return ", ".join(f"{name} {new[name]}, before it was {old[name]}" for name in old if old[name] != new[name])
