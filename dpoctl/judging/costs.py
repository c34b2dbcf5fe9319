"""What judging is likely to cost, for --dry-run."""

from collections.abc import Iterable
from typing import Any

from ..config.judge_options import JudgeOptions
from .comparisons import Comparison
from .prompts import Criterion

_TOKENS_PER_WORD = 1.4  # of English


def tokens_of(criterion: Criterion, comparisons: Iterable[Comparison]) -> int:
    """About how many tokens all requests have."""
    words = sum(len(criterion.request(c.prompt, c.a, c.b, c.key).split()) * len(c.orders) for c in comparisons)
    return round(words * _TOKENS_PER_WORD)


def tokens_without_texts(criterion: Criterion) -> int:
    """About how many tokens a request has beside prompt and candidates."""
    return round(len(criterion.request("", "", "", "").split()) * _TOKENS_PER_WORD)


def cost_lines(options: JudgeOptions, judgements: int, prompt_tokens: int, how: str = "about") -> dict[str, Any]:
    """Tokens, and with prices dollars, at the price of batches where these are asked for."""
    completion_tokens = judgements * options.judge_max_tokens
    shown: dict[str, Any] = {f"prompt tokens, {how}": prompt_tokens, "completion tokens, at most": completion_tokens}
    if options.price_in is not None and options.price_out is not None:
        most = prompt_tokens * options.price_in + completion_tokens * options.price_out
        share = 1 - options.batch_discount if options.judge_batch else 1
        shown["dollars, at most about"] = f"{most * share / 1e6:.2f}"
    return shown
