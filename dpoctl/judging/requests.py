"""What a judge model is asked: requests, their known answers, the parameters, tokens and dollars."""

import threading
from typing import Any

from .. import log
from ..config.judge_options import JudgeOptions
from ..config.schema import flag_named
from ..errors import InputError
from ..runtime.server_errors import CONTENT, ServerError
from .answer_cache import AnswerCache, digest_of
from .parameters import Parameters
from .replies import Answer

_COUNTS = ("asked", "from_cache", "retries", "prompt_tokens", "completion_tokens")
_BATCHED = ("batched", "batched_prompt_tokens", "batched_completion_tokens")  # of these, those of batch files


class Requests:
    """Requests to one judge, which `server` names in the keys of the cache; thread-safe.

    `counts`: answers asked for and of the cache, retries, tokens. They start from `state`, that of an earlier call of
    the command, so that `dollars` is what all answers of the output cost, each counted once. `parameters` are those
    that the server takes: learnt from its errors until it has answered once, then fixed.
    """

    def __init__(self, config: JudgeOptions, state: dict[str, Any] | None = None, server: str = "openai"):
        """Raises InputError as AnswerCache does."""
        self.config, self.server = config, server
        self.cache = AnswerCache(config)
        self.lock = threading.Lock()
        before = state or {}
        self.counts: dict[str, int] = {name: before.get(name, 0) for name in (*_COUNTS, *_BATCHED)}
        self.parameters = Parameters.first(config, before.get("parameters") or {})
        self.rows_written = bool(before)  # with these parameters
        self.accepted = False  # the server has answered with these parameters
        self.priced = config.price_in is not None
        self.dearest = self.dollars / max(1, self.answers)

    @property
    def answers(self) -> int:
        return self.counts["asked"] + self.counts["from_cache"]

    @property
    def dollars(self) -> float:
        counts = self.counts
        batched = self.price(counts["batched_prompt_tokens"], counts["batched_completion_tokens"])
        return self.price(counts["prompt_tokens"], counts["completion_tokens"]) - self.config.batch_discount * batched

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars of single calls."""
        return (prompt_tokens * (self.config.price_in or 0) + completion_tokens * (self.config.price_out or 0)) / 1e6

    def price_of(self, answer: Answer) -> float:
        """US dollars of an answer, as it was asked for."""
        share = 1 - self.config.batch_discount if answer.batch else 1.0
        return share * self.price(answer.prompt_tokens, answer.completion_tokens)

    def state(self) -> dict[str, Any]:
        """What a resumed command needs."""
        return self.told() | {"parameters": self.parameters.state()}

    def told(self) -> dict[str, int]:
        """The counts; those of batch files where there are any."""
        return {name: n for name, n in self.counts.items() if n or name not in _BATCHED}

    def body(self, request: str, parameters: Parameters | None = None) -> dict[str, Any]:
        """The body of a request, with the parameters that are sent now or those that are given."""
        parameters = parameters or self.parameters
        message = {"role": "user", "content": request + parameters.addition}
        return {"model": self.config.judge_model, "messages": [message]} | parameters.sent()

    def digest(self, body: dict[str, Any]) -> str:
        """The key of a request's answer in the cache."""
        return digest_of({"server": self.server, **body})

    def known(self, request: str) -> Answer | None:
        """The cached answer to a request that was made before."""
        answer = self.cache.read(self.digest(self.body(request)))
        if answer is not None:
            self.count(answer, "from_cache")
        return answer

    def count(self, answer: Answer, source: str) -> None:
        """Count an answer, which was `asked` for or is `from_cache`, with its tokens."""
        with self.lock:
            self.counts[source] += 1
            self.counts["prompt_tokens"] += answer.prompt_tokens
            self.counts["completion_tokens"] += answer.completion_tokens
            if answer.batch:
                self.counts["batched"] += 1
                self.counts["batched_prompt_tokens"] += answer.prompt_tokens
                self.counts["batched_completion_tokens"] += answer.completion_tokens
            self.dearest = max(self.dearest, self.price_of(answer))

    def learn(self, parameters: Parameters, error: ServerError) -> bool:
        """Whether a request with `parameters` can be repeated with other ones; a change is said once.

        Raises InputError where answers that are counted already were given with a parameter that is refused now.
        """
        with self.lock:
            if self.parameters is not parameters:  # another request has learnt it
                return True
            changed = None if self.accepted else parameters.without(error)
            if changed is None:
                return False
            lost = [name for name, _ in parameters.values if name not in dict(changed.values)]
            if lost and self.rows_written:
                raise InputError(
                    f"the judge's server refuses {lost[0]}, with which {self.answers} answers were given: {error}",
                    hint=f"use --overwrite, and another {flag_named(self.config, 'judge_cache_dir')}, to judge all "
                    "comparisons without it",
                )
            self.parameters = changed
        if changed.limit != parameters.limit:
            log.warn(f"the judge's server takes {changed.limit} in place of {parameters.limit}: {error}")
        for name in lost:
            log.warn(f"the judge's server refuses {parameters.told_without(name)}: {error}")
        return True

    def refuse(self, error: ServerError, more: str = "") -> InputError:
        """The error with which the command stops, since the server refuses every request."""
        model, url, most = (
            flag_named(self.config, name) for name in ("judge_model", "judge_base_url", "judge_max_tokens")
        )
        hint = f"401: OPENAI_API_KEY; 404 and 400: {model}, {url}, {most}"
        if error.kind == CONTENT:
            hint = f"the server's limits: {most} counts too; texts that are refused can be left out of the files"
        return InputError(f"the judge's server refuses the request: {error}{more}", hint)
