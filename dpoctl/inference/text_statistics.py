"""Statistics of generated text that need no model, and the mean with its standard error.

Distinct-n is from Li et al. 2016 (1510.03055); it is low for a policy that repeats itself.
"""

from collections.abc import Hashable, Sequence
from math import sqrt
from typing import Any

_LOOP_NGRAM = 8  # longest repeating unit, in tokens
_LOOP_TIMES = 3  # repetitions that make a loop
_LOOP_TOKENS = 12  # tokens that the repetitions must cover


def distinct_n(texts: Sequence[str | Sequence[int]], n: int) -> float:
    """Distinct n-grams divided by all n-grams of the corpus; 0 where no text holds n units.

    A string is split into words at white space; token ids are used as given. N-grams do not cross texts. The value
    falls with the size of the corpus, so compare only equal numbers of texts.
    """
    different: set[tuple[Hashable, ...]] = set()
    total = 0
    for text in texts:
        units = text.split() if isinstance(text, str) else list(text)
        for start in range(len(units) - n + 1):
            different.add(tuple(units[start : start + n]))
            total += 1
    return len(different) / total if total else 0.0


def repetition_loop(ids: Sequence[Any]) -> bool:
    """Whether a text ends in a loop: its tail is one n-gram (n <= 8) three times or more, over 12 tokens or more.

    The last repetition may be incomplete, as where sampling stopped at its length limit.
    """
    for n in range(1, _LOOP_NGRAM + 1):
        matched = 0  # tokens from the end that equal the token n before them
        while matched < len(ids) - n and ids[-1 - matched] == ids[-1 - matched - n]:
            matched += 1
        if matched + n >= max(_LOOP_TIMES * n, _LOOP_TOKENS):
            return True
    return False


def mean_se(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """(mean, its standard error) of `values`; the error of fewer than two is nan.

    With `clusters`, one key per value (the prompt of each sample), both are computed over the cluster means, because
    samples of one prompt are correlated; every prompt has the same weight.
    """
    if clusters is not None:
        groups: dict[Hashable, list[float]] = {}
        for value, cluster in zip(values, clusters, strict=True):
            groups.setdefault(cluster, []).append(value)
        values = [sum(group) / len(group) for group in groups.values()]
    n = len(values)
    if n == 0:
        return float("nan"), float("nan")
    mean = sum(values) / n
    if n == 1:
        return mean, float("nan")
    return mean, sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
