"""What make-prefs says of its samples and pairs, once for a complete output, whoever wrote its shards."""

from collections.abc import Collection
from typing import Any

from .. import log
from ..outputs.shard_totals import BINS

_WIDTH = 40  # columns of the longest bar


def say_preferences(out: str, metrics: dict[str, Any], how: str, score_types: Collection[str] | None) -> None:
    """Say what was made and dropped, and the histogram of probabilities; of a shard (`score_types` None) one line."""
    made = f"{metrics['pairs']} pairs" if "pairs" in metrics else _labels(metrics)
    log.say(f"{out}: {made} from {metrics['samples']} samples of {metrics['prompts']} prompts ({how})")
    if score_types is None:
        return
    if dropped := _dropped(metrics):
        log.say(f"dropped: {dropped}")
    if "pairs" not in metrics and not (metrics["desirable"] and metrics["undesirable"]):
        log.warn(f"{out}: every completion has one label, and training needs both: another --threshold has both")
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


def _labels(metrics: dict[str, Any]) -> str:
    return f"{metrics['desirable']} desirable and {metrics['undesirable']} undesirable completions"


def _dropped(metrics: dict[str, Any]) -> str:
    """What was left out, by reason."""
    if "pairs" in metrics:
        told = [f"{metrics['ties']} ties", f"{metrics['duplicates']} pairs of equal texts"]
    else:
        told = [f"{metrics['ties']} samples in the middle of their prompt"] if "ties" in metrics else []
    further = {"invalid": "without a valid verdict", "below_margin": "below --min-margin"}
    return ", ".join(told + [f"{metrics[name]} {words}" for name, words in further.items() if name in metrics])
