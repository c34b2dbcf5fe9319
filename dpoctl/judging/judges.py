"""The judges that are no people: a SCORER, or a language model on a server. Each turns comparisons into judgements."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from ..config.judging import Judge
from ..runtime import signals
from .client import Answer, Client, Pending
from .comparisons import Comparison
from .prompts import load_criterion, parse_verdict

_POLL_S = 0.2  # how often signals are looked for while requests are in flight


class Judging(Protocol):
    """A judge that works on batches; `last_failure` is why its latest request failed."""

    last_failure: str

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]]:
        """The judgements of a batch. Those that failed for a transient reason are left out."""

    def state(self) -> dict[str, Any]:
        """What a resumed command needs to continue counting."""

    def metrics(self) -> dict[str, str]:
        """What the progress line shows."""

    def cost(self) -> dict[str, Any]:
        """What the judgements cost, for the manifest."""


class ScorerJudge:
    """The higher score wins, whatever the order."""

    def __init__(self, config: Judge, state: dict[str, Any]):
        from ..inference.scorers import ScorerOptions, load_scorer
        from ..runtime.devices import pick_device

        self.last_failure = ""
        self.name, self.criterion = str(config.scorer), config.criterion
        options = ScorerOptions(
            pick_device(config.device), config.scorer_revision, config.scorer_trust_remote_code, config.score_text
        )
        self.scorer = load_scorer(self.name, options)

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]]:
        texts = [{"prompt": c.prompt, "completion": side} for c in batch for side in (c.a, c.b)]
        scores = self.scorer.score(texts)
        rows = []
        for i, c in enumerate(batch):
            a, b = scores.keys[2 * i : 2 * i + 2]
            raw = f"{scores.values[2 * i]:.6g} {scores.values[2 * i + 1]:.6g}"
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

    def __init__(self, config: Judge, state: dict[str, Any]):
        self.config = config
        self.criterion = load_criterion(config.criterion, config.prompt_noun)
        self.client = Client(config, state)
        self.last_failure = ""

    def rows(self, batch: Sequence[Comparison]) -> list[dict[str, Any]]:
        """Raises CostReached and InputError, as Client.ask does."""
        asked = [(c, order) for c in batch for order in c.orders]
        requests = [self.criterion.request(c.prompt, *c.shown(o), f"{self.config.seed} {c.key}") for c, o in asked]
        answers = [self.client.known(request) for request in requests]
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = {pool.submit(self.client.ask, r): i for i, r in enumerate(requests) if answers[i] is None}
            try:
                self._collect(futures, answers)
            except BaseException:
                self.client.stopped.set()  # requests in flight stop retrying; their answers are cached
                pool.shutdown(cancel_futures=True)
                raise
        judged = [(c, order, answer.text) for (c, order), answer in zip(asked, answers, strict=True) if answer]
        judge = str(self.config.model)
        return [c.row(order, parse_verdict(text), self.config.criterion, judge, text) for c, order, text in judged]

    def _collect(self, futures: dict[Future[Answer], int], answers: list[Answer | None]) -> None:
        """Put each future's answer at its index; None stays where the request failed for a transient reason."""
        left = set(futures)
        while left:
            signals.at_boundary("the answers received so far, which are cached")
            done, left = wait(left, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    answers[futures[future]] = future.result()
                except Pending as e:
                    self.last_failure = str(e)

    def state(self) -> dict[str, Any]:
        return dict(self.client.counts)

    def metrics(self) -> dict[str, str]:
        shown = {"cached": str(self.client.counts["from_cache"]), "retries": str(self.client.counts["retries"])}
        return shown | ({"dollars": f"{self.client.dollars:.4f}"} if self.client.priced else {})

    def cost(self) -> dict[str, Any]:
        """Over all calls of the command: requests made, answers from the cache, tokens, and the dollars of both."""
        return dict(self.client.counts) | ({"dollars": round(self.client.dollars, 6)} if self.client.priced else {})


def open_judge(config: Judge, state: dict[str, Any]) -> Judging:
    """The judge of --backend scorer or openai. Raises InputError as load_scorer, load_criterion and Client do."""
    return ScorerJudge(config, state) if config.backend == "scorer" else ModelJudge(config, state)
