"""The judges that are no people: a SCORER, or a language model on a server. Each turns comparisons into judgements."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ..config.judge_options import JudgeOptions
from ..config.schema import flag_named
from ..errors import InputError
from ..inference.options import ScoringOptions, TemplateArguments
from ..outputs.claims import Output
from ..runtime.http import as_completed
from .batch_client import BatchClient
from .batch_folder import FileClient
from .batch_records import Records
from .batched import BatchedRequests
from .chat_judge import ChatJudge
from .client import Client, Pending
from .comparisons import Comparison
from .reading import require_logprobs
from .replies import Answer, Refusal, Reply
from .requests import Requests

_FIRST_REFUSED = 8  # refusals without a stated reason before any answer: the mistake is in the command


class Judging(Protocol):
    """A judge that works on batches; `last_failure` is why its latest request failed."""

    last_failure: str
    rows_each: int  # judgements in one answer: the criteria of a rubric

    def ahead(self, comparisons: Sequence[Comparison]) -> None:
        """Ask about all comparisons that follow, where the judge does that at once."""

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]]:
        """The judgements of a batch, those of each comparison in its orders. Those that failed for a transient reason
        are left out."""

    def state(self) -> dict[str, Any]:
        """What a resumed command needs to continue counting."""

    def metrics(self) -> dict[str, str]:
        """What the progress line shows."""

    def cost(self) -> dict[str, Any]:
        """What the judgements cost, for the manifest."""


class ScorerJudgeOptions(ScoringOptions, TemplateArguments, Protocol):
    """What a scorer as judge reads of a command's options."""

    @property
    def scorer(self) -> str | None: ...

    @property
    def criterion(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...


class ScorerJudge:
    """The higher score wins, whatever the order."""

    rows_each = 1

    def __init__(self, config: ScorerJudgeOptions, output: Output):
        from ..inference.options import template_options
        from ..inference.scorers import load_scorer, scorer_options
        from ..runtime.devices import open_compute

        self.last_failure = ""
        self.name, self.criterion = str(config.scorer), config.criterion
        compute = open_compute(config.device, config.dtype)
        self.scorer = load_scorer(self.name, scorer_options(config, compute, template_options(config, output)))

    def ahead(self, comparisons: Sequence[Comparison]) -> None:
        """Scores are computed batch by batch."""

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]]:
        texts = {id(row): row for c in batch for row in c.rows}  # a sample may be in several comparisons
        scores = self.scorer.score(list(texts.values()))
        of = dict(zip(texts, zip(scores.keys, scores.values, strict=True), strict=True))
        rows = []
        for c in batch:
            (a, value_a), (b, value_b) = (of[id(row)] for row in c.rows)
            raw = f"{value_a:.6g} {value_b:.6g}"
            for order in c.orders:
                choice = "tie" if a == b else "A" if (a > b) == (order == "AB") else "B"
                rows.append(c.row(order, choice, self.criterion, self.name, raw))
        return rows

    def state(self) -> dict[str, Any]:
        return {}

    def metrics(self) -> dict[str, str]:
        return {}

    def cost(self) -> dict[str, Any]:
        return {}


class RequestedJudge(ChatJudge):
    """A judge that is asked by the chat-completions protocol; `client` counts what that costs."""

    client: Requests

    def _check_first(self, replies: Sequence[Reply | None]) -> None:
        if not self.client.rows_written:
            require_logprobs(replies, self.config)

    def _decide(self, replies: list[Reply | None]) -> None:
        """Refusals count as invalid only where the server has answered something; else they stay pending.

        Raises InputError where it refuses everything that it is asked.
        """
        if self.client.answers or self.client.accepted:
            self.client.rows_written = True
            return
        refused = [reply for reply in replies if isinstance(reply, Refusal)]
        if refused and len(refused) == len(replies):
            more = f"; so it did with all {len(refused)} requests" if len(refused) > 1 else ""
            raise self.client.refuse(refused[-1].error, more)
        for i, _ in enumerate(replies):
            replies[i] = None

    def state(self) -> dict[str, Any]:
        return self.client.state()

    def metrics(self) -> dict[str, str]:
        shown = {"cached": str(self.client.counts["from_cache"]), "retries": str(self.client.counts["retries"])}
        return shown | ({"dollars": f"{self.client.dollars:.4f}"} if self.client.priced else {})

    def cost(self) -> dict[str, Any]:
        """Over all calls of the command: answers by source, tokens, dollars, and the parameters that were sent."""
        counts: dict[str, Any] = self.client.told() | {"parameters": str(self.client.parameters)}
        return counts | ({"dollars": round(self.client.dollars, 6)} if self.client.priced else {})


class ModelJudge(RequestedJudge):
    """A language model on a server, asked about every order in parallel; `state` holds the counts of earlier calls."""

    client: Client

    def __init__(self, config: JudgeOptions, state: dict[str, Any]):
        super().__init__(config)
        self.client = Client(config, state)
        self.in_flight = Records(self.client.cache.folder, self.client.server).by_digest()

    def replies(self, requests: list[str]) -> list[Reply | None]:
        """Raises CostReached and InputError, as Client.ask does, and InputError where every request is refused."""
        counts = dict(self.client.counts)
        parameters = self.client.parameters
        replies: list[Reply | None] = [self.client.known(request) for request in requests]
        left = [i for i, reply in enumerate(replies) if reply is None]
        from_cache = len(requests) - len(left)
        self._refuse_in_flight(requests[i] for i in left)
        if not self.client.accepted:
            left = self._open(requests, replies, left)
            self._check_first(replies)
        self._ask(requests, replies, left)
        self._check_first(replies)
        if from_cache and parameters.values != self.client.parameters.values:  # these were given with other ones
            self.client.counts = counts
            return self.replies(requests)
        self._decide(replies)
        return replies

    def _refuse_in_flight(self, requests: Iterable[str]) -> None:
        """Raises InputError for a request that a batch in flight has: its answer is paid for already."""
        for request in requests if self.in_flight else ():
            if record := self.in_flight.get(self.client.digest(self.client.body(request))):
                raise InputError(
                    f"batch {record.batch_id} of the judge's server, which is in flight, holds some of these requests",
                    hint=f"add {flag_named(self.config, 'judge_batch')} to collect its answers",
                )

    def _open(self, requests: list[str], replies: list[Reply | None], left: list[int]) -> list[int]:
        """Ask one request after another until one is answered, so that parameters are learnt from few.

        `left`: the indices of requests to ask; those that remain are returned. Raises InputError where the server
        refuses the first ones without stating that it is for their content.
        """
        works, refused = self.client.answers > 0, 0
        for n, i in enumerate(left, start=1):
            self._ask(requests, replies, [i])
            reply = replies[i]
            if reply is None or isinstance(reply, Answer):  # waiting for a busy server in each, one by one, takes hours
                return left[n:]
            refused += not reply.certain
            if refused == _FIRST_REFUSED and not works:
                raise self.client.refuse(reply.error, f"; so it did with {refused} requests, the first ones")
        return []

    def _ask(self, requests: list[str], replies: list[Reply | None], left: list[int]) -> None:
        """Put the server's reply to each request `left` at its index; None stays where it failed for now."""
        with ThreadPoolExecutor(self.config.judge_concurrency) as pool:
            futures = {pool.submit(self.client.ask, requests[i]): i for i in left}
            try:
                self._collect(futures, replies)
            except BaseException:
                self.client.stopped.set()  # requests in flight stop retrying; their answers are cached
                pool.shutdown(cancel_futures=True)
                raise

    def _collect(self, futures: dict[Future[Reply], int], replies: list[Reply | None]) -> None:
        for future in as_completed(futures, "the answers received so far, which are cached"):
            try:
                replies[futures[future]] = future.result()
            except Pending as e:
                self.last_failure = str(e)


class BatchJudge(RequestedJudge):
    """A language model that is asked in batch files, of a server or on disk."""

    client: BatchedRequests

    def __init__(self, config: JudgeOptions, client: BatchedRequests):
        super().__init__(config)
        self.client = client
        self.fetched: set[str] = set()

    def ahead(self, comparisons: Sequence[Comparison]) -> None:
        """Raises InputError and Interrupted as the client's `fetch` does."""
        self._fetch(self.requests(comparisons))

    def replies(self, requests: list[str]) -> list[Reply | None]:
        """Raises InputError where every request is refused, and as `ahead` does, which it does where that was not."""
        if not self.fetched.issuperset(requests):
            self._fetch(requests)
        replies = [self.client.reply(request) for request in requests]
        try:
            self._check_first(replies)
            self._decide(replies)
        except InputError:  # the mistake is in the command
            self.client.forget_refusals()
            raise
        return replies

    def _fetch(self, requests: list[str]) -> None:
        self.fetched.update(requests)
        self.client.fetch(requests)
        self.last_failure = self.client.last_failure


def open_judge(backend: str, config: Any, state: dict[str, Any], output: Output) -> Judging:
    """The judge that `backend` names, with the options of a command: scorer, openai, or a local model's engine.

    Raises InputError as load_scorer, load_criterion, Requests and LocalJudge do.
    """
    if backend == "scorer":
        return ScorerJudge(config, output)
    if backend in ("vllm", "transformers"):
        from .local import LocalJudge  # which imports torch

        return LocalJudge(config, state, output)
    if config.judge_batch_files:
        return BatchJudge(config, FileClient(config, state, output))
    return BatchJudge(config, BatchClient(config, state, output)) if config.judge_batch else ModelJudge(config, state)
