"""The table with which judge ends, and with which merge ends after joining judge's shards."""

from pathlib import Path
from typing import Any

from .. import log
from ..judging.replies import CUT
from ..judging.summary import INDIFFERENT
from . import checks, grades, tables
from .collect import CheckedJudge

_MANY_INVALID = 0.1  # share of judgements
_MOSTLY = 0.9


def show(options: dict[str, Any], out: str, metrics: dict[str, Any]) -> None:
    """Print judge's metrics on stdout, and comparisons as log lines; `options` are judge's, by their recipe names.

    Of a rubric each criterion is shown as a file of one criterion is.
    """
    for name, of_criterion in metrics.get("by_criterion", {}).items():
        show(options | {"criterion": name}, out, of_criterion)
    if checked := metrics.get("check"):
        _show_check(checked, out)
        return
    if "grades" in metrics:
        grades.show(options, out, metrics)
        return
    names = [Path(p).name for p in options["candidates"]] + ["reference"]
    within = bool(options.get("within"))  # absent in manifests of older versions
    named = {"lower k over higher": metrics.get("summary")} if within else {"A over B": metrics.get("summary")}
    named["canary over B"] = metrics.get("canary")
    shown = {name: summary for name, summary in named.items() if summary} | metrics.get("people", {})
    shown |= {f"  {n} {s[n]:g}": s for n in ("temperature", "step") for s in metrics.get(f"by_{n}", [])}
    if shown:  # a shard may have judged nothing
        title = f"{names[0]} (A) against {names[1]} (B), criterion {options['criterion']}"
        if within:
            title = f"the samples of each prompt in {names[0]}, criterion {options['criterion']}"
        tables.show(tables.judgement_summaries(shown), title)
    _say_of_probabilities(metrics.get("summary", {}))
    for name, found in (("", metrics.get("summary", {})), (" of the canary", metrics.get("canary", {}))):
        if reasons := found.get("invalid_reasons"):
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            text = f"{sum(reasons.values())} judgements{name} are invalid ({found['invalid']:.1%}): {counted}"
            tell = log.warn if found["invalid"] > tables.MANY_INVALID else log.say
            more = "; --max-tokens limits thoughts too" if CUT in reasons else ""
            tell(f"{text}; see `raw` in {out}{more}")
    if "compare" in metrics:
        c = metrics["compare"]
        interval = f"{c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})"
        log.say(f"against {options['compare']}: {interval}, p {c['p']:.3f}, {c['n']} prompts")
    for name, person in metrics.get("people", {}).items():
        if person.get("both_bad"):
            log.say(f"{name}: both bad {person['both_bad']} times, counted as ties")
    if alpha := metrics.get("alpha"):
        _say_alpha(alpha)
    agreements = {f"of {name}": a for name, a in metrics.get("agreement", {}).items()}
    agreements |= {f"with {options['against']}": metrics["against"]} if "against" in metrics else {}
    for name, a in agreements.items():
        if a:
            log.say(f"agreement {name}: {a['raw']:.3f}, kappa {a['kappa']:.3f} over {a['n']} comparisons")
    if c := metrics.get("calibration"):
        title = f"Calibration against {options['against']}, by the judge's confidence"
        tables.show(tables.calibration(c["bins"]), title)
        log.say(f"calibration: Brier score {c['brier']:.3f}, error {c['error']:.3f} over {c['n']} comparisons")


def _say_of_probabilities(summary: dict[str, Any]) -> None:
    """What a win rate of probabilities is, and where it says no more than one of verdicts."""
    if not summary.get("soft"):
        return
    log.say(
        f"the win rate is the mean of the judge's probabilities; a tie is a comparison whose probability is less than "
        f"{INDIFFERENT:g} away from 1/2"
    )
    if summary["sure"] > _MOSTLY:
        log.say(
            f"{summary['sure']:.0%} of the probabilities are below 0.01 or above 0.99: the judge is sure before it "
            "writes its choice, and they say little more than verdicts"
        )


def _show_check(metrics: dict[str, Any], out: str) -> None:
    """The table of judge --check, and what was found in one sentence."""
    shown = CheckedJudge(out, metrics)
    tables.show(checks.table(metrics), f"Check of {shown.title}", left=["verdict"])
    log.say(f"{metrics['judge']}: {checks.conclusion(metrics)}")
    if metrics["invalid"] > _MANY_INVALID:
        log.warn(f"{metrics['invalid']:.1%} of the answers are invalid; see `raw` in {out}")


def _say_alpha(alpha: dict[str, Any]) -> None:
    over = f"of {alpha['judges']} people, over {alpha['n']} comparisons that two or more answered"
    if alpha["nominal"] is None:
        log.say(f"Krippendorff's alpha is not defined {over}: all answers are equal")
        return
    low, high = alpha["interval"]
    log.say(
        f"Krippendorff's alpha {over}: {alpha['nominal']:.3f} ({low:.3f} to {high:.3f}), "
        f"with ties between a and b {alpha['ordinal']:.3f}"
    )
