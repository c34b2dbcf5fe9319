"""Requests to a judge whose replies come in files: which have none yet, and what each result means."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ..config.judge_options import JudgeOptions
from ..outputs.answers import Answers
from ..outputs.claims import Output
from ..runtime.server_errors import CONTENT, FATAL, TRANSIENT, ServerError
from .batch_files import Result, request_line
from .replies import Refusal, Reply
from .requests import Requests

REFUSALS = ".refusals"  # of the file beside the output that keeps them until its rows are written


class BatchedRequests(Requests):
    """`fetch` asks for many replies at once, and `reply` gives each of them.

    Answers are in the cache; refusals are not, and are kept beside the output until it is complete. A request that
    keeps failing for a transient reason is left without a reply; `last_failure` is the reason of the latest.
    """

    def __init__(self, config: JudgeOptions, state: dict[str, Any], output: Output, server: str):
        """Raises InputError as Requests does."""
        super().__init__(config, state, server)
        self.last_failure = ""
        self.refusals = Answers(output.out.with_name(output.out.name + REFUSALS), output.resuming)
        self._failures: Counter[str] = Counter()
        self._fresh: set[str] = set()  # answered in this call of the command, and not counted yet
        self._known: dict[str, float] = {}  # dollars of the answers of this fetch that are in the cache

    @abstractmethod
    def fetch(self, requests: Iterable[str]) -> None:
        """Get the replies to requests, as far as they can be had now."""

    def reply(self, request: str) -> Reply | None:
        """The answer, which is counted, or the refusal; None where there is none yet."""
        digest = self.digest(self.body(request))
        if answer := self.cache.read(digest):
            self.count(answer, "asked" if digest in self._fresh else "from_cache")
            self._fresh.discard(digest)
            return answer
        if kept := self.refusals.known(digest):
            return Refusal(ServerError(**kept["error"]), kept["certain"])
        return None

    def missing(self, requests: Iterable[str]) -> dict[str, str]:
        """The lines, by digest, of the requests that are to be asked."""
        lines: dict[str, str] = {}
        for request in requests:
            body = self.body(request)
            digest = self.digest(body)
            if digest in self._known or digest in lines or self.refusals.known(digest):
                continue
            if self._failures[digest] > self.config.judge_retries:
                continue
            if answer := self.cache.read(digest):
                self._known[digest] = self.price_of(answer)
            else:
                lines[digest] = request_line(digest, body)
        return lines

    def receive(self, results: Mapping[str, Result], wanted: Collection[str]) -> ServerError | None:
        """Keep the answers, and the refusals of those that are `wanted`; failures that may pass are counted.

        Returns an error that is about every request, for the caller to raise.
        """
        for digest, result in results.items():
            if result.answer:
                self.cache.write(digest, result.answer)
                self._fresh.add(digest)
                self.accepted |= digest in wanted
        parameters, fatal = self.parameters, None
        for digest, result in results.items():
            error = result.error
            if error is None or digest not in wanted or self.cache.read(digest):
                continue
            if not result.no_choice and self.learn(parameters, error):
                continue
            if result.no_choice or error.kind not in (FATAL, TRANSIENT):
                self.refusals.keep(digest, {"error": asdict(error), "certain": error.kind == CONTENT})
            elif error.kind == FATAL:
                fatal = error
            else:
                self.failed([digest], f"status {error}")
        return fatal

    def forget_refusals(self) -> None:
        """Ask about them again in the next call of the command."""
        self.refusals.close()
        self.refusals.forget()

    def failed(self, digests: Iterable[str], reason: str) -> None:
        """Count requests that failed for a reason that may pass."""
        self._failures.update(digests)
        self.last_failure = reason
