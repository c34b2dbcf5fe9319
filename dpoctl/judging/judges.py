"""Who decides without people: a SCORER, or a language model behind a server; each turns comparisons into judgements."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace

from ..outputs.files import cache_home
from ..runtime import signals
from .client import Client, Pending
from .comparisons import Comparison
from .prompts import load_criterion, parse_verdict

_LOOK_EVERY_S = 0.2  # for a signal, while answers are waited for


class ScorerJudge:
    """The higher score wins; the order means nothing to it."""

    last_failure = ""

    def __init__(self, config, state: dict):
        from ..inference.scorers import ScorerOptions, load_scorer

        self.config = config
        self.scorer = load_scorer(config.scorer, ScorerOptions(text=config.score_text))

    def rows(self, batch: Sequence[Comparison]) -> list[dict]:
        texts = [{"prompt": c.prompt, "completion": side} for c in batch for side in (c.a, c.b)]
        scores = self.scorer.score(texts)
        rows = []
        for i, c in enumerate(batch):
            a, b = scores.keys[2 * i : 2 * i + 2]
            raw = f"{scores.values[2 * i]:.6g} {scores.values[2 * i + 1]:.6g}"
            for order in c.orders:
                choice = "tie" if a == b else "A" if (a > b) == (order == "AB") else "B"
                rows.append(c.row(self.config, order, choice, self.config.scorer, raw))
        return rows

    def state(self) -> dict:
        return {}

    def metrics(self) -> dict[str, str]:
        return {}

    def cost(self) -> dict:
        return {}


class ModelJudge:
    """A language model behind a server, asked about every order in parallel; `state` is what it had counted before."""

    def __init__(self, config, state: dict):
        config = replace(config, cache_dir=config.cache_dir or str(cache_home() / "judge"))
        self.config, self.criterion = config, load_criterion(config.criterion, config.prompt_noun)
        self.client = Client(config, state)
        self.last_failure = ""

    def rows(self, batch: Sequence[Comparison]) -> list[dict]:
        """Rows of what was judged; what failed for a passing reason is left out. Raises CostReached, InputError."""
        asked = [(c, order) for c in batch for order in c.orders]
        requests = [self.criterion.request(c.prompt, *c.shown(o), f"{self.config.seed} {c.key}") for c, o in asked]
        answers = [self.client.known(request) for request in requests]
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = {pool.submit(self.client.ask, r): i for i, r in enumerate(requests) if answers[i] is None}
            try:
                left = set(futures)
                while left:
                    signals.at_boundary("the answers that came so far, which are kept")
                    done, left = wait(left, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        try:
                            answers[futures[future]] = future.result()
                        except Pending as e:
                            self.last_failure = str(e)
            except BaseException:
                self.client.stopped.set()  # those under way end their waiting; what they are answered is kept
                pool.shutdown(cancel_futures=True)
                raise
        judged = [(c, order, answer.text) for (c, order), answer in zip(asked, answers, strict=True) if answer]
        return [c.row(self.config, o, parse_verdict(text), self.config.model, text) for c, o, text in judged]

    def state(self) -> dict:
        return dict(self.client.counts)

    def metrics(self) -> dict[str, str]:
        shown = {"cached": str(self.client.counts["from_cache"]), "retries": str(self.client.counts["retries"])}
        return shown | ({"dollars": f"{self.client.dollars:.4f}"} if self.client.priced else {})

    def cost(self) -> dict:
        """Over all calls of the command: what was asked anew, what the cache knew, tokens, dollars of both."""
        return dict(self.client.counts) | ({"dollars": round(self.client.dollars, 6)} if self.client.priced else {})


JUDGES = {"openai": ModelJudge, "scorer": ScorerJudge}
