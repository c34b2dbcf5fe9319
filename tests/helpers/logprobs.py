"""Answers of chat-completions servers with log-probabilities, as several servers spell their tokens."""

import math

from helpers.judge_server import Special, choice


def entry(token: str, p: float = 0.9, top: dict[str, float] | None = None, raw: bytes | None = None) -> dict:
    """A token, its probability and those of the most probable ones; `bytes` are as servers send them, or `raw`."""
    listed = [{"token": name, "logprob": math.log(q), "bytes": list(name.encode())} for name, q in (top or {}).items()]
    said = raw if raw is not None else token.encode()
    return {"token": token, "logprob": math.log(p), "bytes": list(said), "top_logprobs": listed}


def spelt(*tokens: str | dict) -> dict:
    """`logprobs` of a choice: texts are tokens whose alternatives do not matter."""
    return {"content": [token if isinstance(token, dict) else entry(token, top={token: 0.9}) for token in tokens]}


def between(p: float, other: float = 0.0, a: str = " A", b: str = " B") -> dict:
    """The token of a choice with probability p of A against B; `other` is that of something else."""
    top = {a: p * (1 - other), b: (1 - p) * (1 - other), "\n": other}
    top = dict(sorted(((name, q) for name, q in top.items() if q > 0), key=lambda pair: -pair[1]))
    chosen = a if p >= 0.5 else b
    return entry(chosen, top[chosen], top)


def with_logprobs(content: str, logprobs: dict | None, **message) -> Special:
    """A response of status 200 with one choice and its log-probabilities."""
    made = choice(content, **message)
    made.body["choices"][0]["logprobs"] = logprobs
    return made


def sure_of_a(p: float) -> Special:
    """A judge that writes its choice alone, A with probability p."""
    token = between(p)
    return with_logprobs(f"Preferred:{token['token']}", spelt("Pre", "ferred", ":", token, "<|im_end|>"))
