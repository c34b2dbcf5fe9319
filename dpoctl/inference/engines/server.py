"""The engine that asks a server which holds the model: token ids are sent, and token ids come back."""

import hashlib
import json
import queue
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from ... import log
from ...data.codec import Codec
from ...errors import InputError, Interrupted
from ...models.load import count_weights, vocabulary_without_weights
from ...outputs.answers import Answers
from ...outputs.claims import Output
from ...outputs.files import sha256_path
from ...runtime import signals
from ..generate import Sampling
from ..options import EngineOptions
from .engine import OutsideEngine, Row, Sampled, seed_of
from .server_client import AnotherModel, Pending, ServerClient
from .server_protocols import Request

_POLL_S = 0.2  # how often signals are looked for while requests are in flight
_GRACE_S = 5.0  # for requests in flight, once no more are sent: a batch system kills soon after its signal
# Accents, scripts, an emoji, blanks, digits and code: what tokenizers split in different ways.
_PLAIN = "The café's naïve façade: 東京 Привет مرحبا 🙂\n\n\tif x1 >= 1024:  return 'Ünïcode' # 3.14159 -- ok?  "
_AWAY = "rerun the command to resume once the server answers"


class ServerEngine(OutsideEngine):
    """Every completion is a request of its own with a seed of its own, `concurrency` of them in flight.

    Before the first one the server is asked what it serves, and whether it has the tokenizer of --model; the model is
    checked again after each lost connection and at each batch's end. Raises InputError where they differ, and
    Interrupted where the server is away.
    """

    named = "the server"

    def __init__(self, options: EngineOptions, model: str, codec: Codec, context: int | None):
        self.options, self.model, self.codec = options, model, codec
        size = vocabulary_without_weights(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
        vocabulary = max(len(codec.tokenizer), size)
        self.client = ServerClient(options, vocabulary)
        self.answers = Answers(None, resuming=False)
        text = codec.tokenizer(_PLAIN, add_special_tokens=False)["input_ids"] or [0]
        held = context or len(text) + 1
        stops = sorted(codec.ends)
        probe = Request(text[: max(1, held - 1)], stops, max_tokens=1, seed=seed_of(0, "probe", 0), temperature=0.0)
        try:
            self.client.open(probe)
            self._check_model()
            self._check_tokenizer()
        except Pending as e:
            raise Interrupted(f"--base-url {self.client.url}: the server does not answer: {e}", hint=_AWAY) from None
        contexts = [each for each in (context, self.client.served.context) if each is not None]
        self.context = min(contexts, default=None)

    def settings(self) -> dict[str, str]:
        return self.client.served.settings()

    def cost(self) -> dict[str, Any]:
        flops = 2 * count_weights(self.model, self.options.revision)
        return {"flops_per_token": flops, "device": self.client.served.server} | self.client.counts

    def keep_answers(self, output: Output) -> None:
        """Keep the answers of a batch beside the output until its rows are written.

        Raises InputError where those that an earlier call left are of another model.
        """
        self.answers.close()
        path = output.out.with_name(output.out.name + ".answers") if output.holds_claim else None
        self.answers = Answers(path, output.resuming)
        before = self.answers.server or {}
        if before.get("settings") == self.settings():
            self.client.require_same_probe([float(each) for each in before.get("probe") or ()])
        elif before:  # another model of this output
            self.answers.forget()
        self.answers.server = {"settings": self.settings(), "probe": self.client.probe}
        output.answers = self.answers
        if len(self.answers):
            log.say(f"{output.out}: {len(self.answers)} answers that the server gave before are used")

    def sample(self, rows: list[Row], sampling: Sampling) -> list[Sampled]:
        """The answer to every row's request, those that are kept first. Raises Interrupted where some are pending."""
        requests = [
            Request(
                row.prompt.ids,
                sorted(row.prompt.stops),
                row.limit,
                row.seed,
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                sampling.stop,
                self.logps,
            )
            for row in rows
        ]
        keys = [self._key(request) for request in requests]
        found = [_stored(self.answers.known(key)) for key in keys]
        left = [i for i, sampled in enumerate(found) if sampled is None]
        self.count(len(requests) - len(left))
        if left:
            batch = _Batch(self, self.options.concurrency)
            try:
                batch.ask({keys[i]: requests[i] for i in left})
                self.client.verify()
            except Pending as e:
                raise self._pending(str(e), len(left) - len(batch.received)) from None
            except AnotherModel:
                self.answers.forget()  # which of them are the other model's is not known
                raise
            if batch.failed:
                raise self._pending(batch.reason, len(left) - len(batch.received))
            found = [sampled or batch.received[key] for sampled, key in zip(found, keys, strict=True)]
        return [sampled for sampled in found if sampled is not None]

    def close(self) -> None:
        self.client.stop()
        self.client.http.close()
        self.answers.close()

    # --- requests

    def count(self, finished: int) -> None:
        """Tell the progress line."""
        if self.on_finished:
            self.on_finished(finished)

    def _pending(self, reason: str, n: int) -> Interrupted:
        kept = "the other answers are kept" if self.answers.path else "finished batches are kept"
        return Interrupted(f"{n} completions are pending: {reason}; {kept}", hint=_AWAY)

    def _key(self, request: Request) -> str:
        asked = json.dumps([self.client.served.model, vars(request)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    # --- the server's model

    def _check_model(self) -> None:
        """Raise InputError where the server loaded other weights than --model's, as far as this machine can see."""
        root, path = self.client.served.root, self.model
        if not root or root == path:
            return
        there, here = Path(root), Path(path).expanduser()
        if there.is_dir() and here.is_dir():
            if not there.samefile(here) and sha256_path(there) != sha256_path(here):
                raise InputError(
                    f"--base-url {self.client.url}: the server serves {root}, which is not --model {path}",
                    hint=f"give the model that is served: --model {root}; or serve {path}",
                )
        else:
            log.warn(
                f"the server calls its model {root}, --model is {path}: from here one cannot see whether they are the "
                "same; its tokenizer is compared"
            )

    def _check_tokenizer(self) -> None:
        """Raise InputError where the server tokenizes otherwise than --model; say where that cannot be seen."""
        tokenizer = self.codec.tokenizer
        theirs = self.client.tokenize(_PLAIN)
        if theirs is None:
            log.warn(f"{self.client.url}: the server has no /tokenize: that its tokenizer is --model's is not checked")
            return
        ours = tokenizer(_PLAIN, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            raise InputError(
                f"--base-url {self.client.url}: the server's tokenizer is not that of --model {self.model}: of "
                f"the same text it makes {_shown(theirs, ours)}",
                hint="give the model that is served as --model",
            )
        special = "".join(dict.fromkeys(map(str, tokenizer.all_special_tokens)))
        if special and self.client.tokenize(special) != tokenizer(special, add_special_tokens=False)["input_ids"]:
            log.warn(
                f"{self.client.url}: the server reads the special tokens {special} otherwise than --model's tokenizer; "
                "dpoctl sends their ids, never their text"
            )


class _Batch:
    """Requests in flight. `received` by key; `failed` requests remain pending, `reason` is the latest failure's."""

    def __init__(self, engine: ServerEngine, concurrency: int):
        self.client, self.answers, self.count = engine.client, engine.answers, engine.count
        self.concurrency = concurrency
        self.received: dict[str, Sampled] = {}
        self.failed, self.reason = 0, ""
        self._in_a_row = 0
        self._outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def ask(self, requests: dict[str, Request]) -> None:
        """Ask all of them. Raises Interrupted at a signal, InputError and StorageError as asking and keeping do."""
        try:
            with ThreadPoolExecutor(min(self.concurrency, len(requests))) as pool:
                futures = [pool.submit(self._one, key, request) for key, request in requests.items()]
                try:
                    self._collect(len(futures))
                except BaseException:
                    self._give_up(pool, futures)
                    raise
        finally:
            self.client.http.close()  # the connections of threads that have ended

    def _one(self, key: str, request: Request) -> None:
        try:
            sampled = self.client.ask(request)
            self.answers.keep(key, {"ids": sampled.ids, "stopped": sampled.stopped, "logps": list(sampled.logps)})
            self.received[key] = sampled
        except BaseException as e:
            self._outcomes.put(e)
        else:
            self._outcomes.put(None)

    def _collect(self, n: int) -> None:
        for _ in range(n):
            outcome = self._next()
            if isinstance(outcome, Pending):
                self.failed, self.reason = self.failed + 1, str(outcome)
                self._in_a_row += 1
                if self._in_a_row >= self.concurrency:  # the server is away: asking all the others would take hours
                    raise outcome
            elif outcome is not None:
                raise outcome
            else:
                self._in_a_row = 0
                self.count(1)

    def _next(self) -> BaseException | None:
        """The next outcome: an error, or None for an answer."""
        while True:
            signals.at_boundary(f"{len(self.received)} answers of this batch, which are kept")
            with suppress(queue.Empty):
                return self._outcomes.get(timeout=_POLL_S)

    def _give_up(self, pool: ThreadPoolExecutor, futures: list[Future[None]]) -> None:
        """Send nothing more; the answers to the requests in flight are kept, if they come soon."""
        self.client.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        wait([future for future in futures if future.running()], timeout=_GRACE_S)
        self.client.abort()


def _stored(answer: dict[str, Any] | None) -> Sampled | None:
    return None if answer is None else Sampled(answer["ids"], answer["stopped"], answer["logps"])


def _shown(theirs: list[int], ours: list[int]) -> str:
    """Where two tokenizations differ."""
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    return f"{len(theirs)} tokens, it is {len(ours)} here; the first difference is at token {at}"
