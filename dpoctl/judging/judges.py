"""The judges that are no people: a SCORER, or a language model on a server. Each turns comparisons into judgements."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ..config.judge_options import JudgeOptions
from ..inference.options import ScoringOptions, TemplateArguments
from ..outputs.claims import Output
from ..runtime.http import as_completed
from .client import Client, Pending
from .comparisons import Comparison
from .questions import question_of
from .reading import read_reply, require_logprobs
from .replies import Answer, Refusal, Reply

_FIRST_REFUSED = 8  # refusals without a stated reason before any answer: the mistake is in the command


class Judging(Protocol):
    """A judge that works on batches; `last_failure` is why its latest request failed."""

    last_failure: str
    rows_each: int  # judgements in one answer: the criteria of a rubric

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


class ModelJudge:
    """A language model on a server, asked about every order in parallel; `state` holds the counts of earlier calls."""

    def __init__(self, config: JudgeOptions, state: dict[str, Any]):
        self.config = config
        self.criterion = question_of(config)
        self.client = Client(config, state)
        self.rows_each = self.criterion.rows_each
        self.last_failure = ""

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]]:
        """Raises CostReached and InputError, as Client.ask does, and InputError where every request is refused."""
        asked = [(c, order) for c in batch for order in c.orders]
        wanted = [self.criterion.request(c.prompt, *c.shown(o), f"{self.config.seed} {c.key}") for c, o in asked]
        requests = list(dict.fromkeys(wanted))  # candidates of a tournament with equal texts are asked about once
        counts = dict(self.client.counts)
        parameters = self.client.parameters
        replies: list[Reply | None] = [self.client.known(request) for request in requests]
        left = [i for i, reply in enumerate(replies) if reply is None]
        from_cache = len(requests) - len(left)
        if not self.client.accepted:
            left = self._open(requests, replies, left)
            self._check_first(replies)
        self._ask(requests, replies, left)
        self._check_first(replies)
        if from_cache and parameters.values != self.client.parameters.values:  # these were given with other ones
            self.client.counts = counts
            return self.rows(batch)
        self._decide(replies)
        of = dict(zip(requests, replies, strict=True))
        answered = [(c, order, of[request]) for (c, order), request in zip(asked, wanted, strict=True)]
        return [row for c, order, reply in answered if reply for row in self._rows(c, order, reply)]

    def _check_first(self, replies: Sequence[Reply | None]) -> None:
        if not self.client.rows_written:
            require_logprobs(replies, self.config)

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

    def _decide(self, replies: list[Reply | None]) -> None:
        """Refusals count as invalid only where the server has answered something; else they stay pending.

        Raises InputError where it refuses everything that it is asked.
        """
        if self.client.answers:
            self.client.rows_written = True
            return
        refused = [reply for reply in replies if isinstance(reply, Refusal)]
        if refused and len(refused) == len(replies):
            more = f"; so it did with all {len(refused)} requests" if len(refused) > 1 else ""
            raise self.client.refuse(refused[-1].error, more)
        for i, _ in enumerate(replies):
            replies[i] = None

    def _rows(self, c: Comparison, order: str, reply: Reply) -> list[dict[str, Any]]:
        """The judgements in one reply: several of a rubric."""
        if lines := self.criterion.lines:
            return lines.rows(c, order, reply, str(self.config.judge_model))
        return [self._row(c, order, reply)]

    def _row(self, c: Comparison, order: str, reply: Reply) -> dict[str, Any]:
        read = read_reply(reply, self.config)
        row = c.row(order, read.choice, self.config.criterion, str(self.config.judge_model), reply.raw)
        if read.p is not None:
            row["p"] = read.p if order == "AB" else 1 - read.p
        return row | ({"reason": read.reason.partition(":")[0]} if read.reason else {})

    def state(self) -> dict[str, Any]:
        return self.client.state()

    def metrics(self) -> dict[str, str]:
        shown = {"cached": str(self.client.counts["from_cache"]), "retries": str(self.client.counts["retries"])}
        return shown | ({"dollars": f"{self.client.dollars:.4f}"} if self.client.priced else {})

    def cost(self) -> dict[str, Any]:
        """Over all calls of the command: answers by source, tokens, dollars, and the parameters that were sent."""
        counts: dict[str, Any] = dict(self.client.counts) | {"parameters": str(self.client.parameters)}
        return counts | ({"dollars": round(self.client.dollars, 6)} if self.client.priced else {})


def open_judge(backend: str, config: Any, state: dict[str, Any], output: Output) -> Judging:
    """The judge that `backend` names, scorer or openai, with the options of a command.

    Raises InputError as load_scorer, load_criterion and Client do.
    """
    return ScorerJudge(config, output) if backend == "scorer" else ModelJudge(config, state)
