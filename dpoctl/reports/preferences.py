"""What make-prefs says of its samples and pairs, once for a complete output, whoever wrote its shards."""

from collections.abc import Collection
from typing import Any

from .. import log
from ..outputs.shard_totals import BINS

_WIDTH = 40  # columns of the longest bar


def say_preferences(out: str, metrics: dict[str, Any], how: str, score_types: Collection[str] | None) -> None:
    """Say what was made and dropped, and the histogram of probabilities; of a shard (`score_types` None) one line."""
    log.say(
        f"{out}: {metrics['pairs']} pairs from {metrics['samples']} samples of {metrics['prompts']} prompts ({how})"
    )
    if score_types is None:
        return
    dropped = f"dropped: {metrics['ties']} ties, {metrics['duplicates']} pairs of equal texts"
    if "invalid" in metrics:
        dropped += f", {metrics['invalid']} without a valid verdict"
    if "below_margin" in metrics:
        dropped += f", {metrics['below_margin']} below --min-margin"
    log.say(dropped)
    kind, told = ", ".join(score_types), []
    if "mean_score" in metrics:
        told.append(f"mean score {metrics['mean_score']:.3f} ({kind})")
    if metrics["mean_length"] is not None:
        told.append(f"mean length {metrics['mean_length']:.1f} tokens")
    if metrics["ended"] is not None:
        told.append(f"{metrics['ended']:.0%} ended with an end token")
    if told:
        log.say(", ".join(told))
    if kind == "prob":
        top = max(1, *metrics["score_histogram"])
        for i, n in enumerate(metrics["score_histogram"]):
            log.say(f"  {i / BINS:.1f}-{(i + 1) / BINS:.1f} {'#' * round(_WIDTH * n / top):<{_WIDTH}} {n}")
