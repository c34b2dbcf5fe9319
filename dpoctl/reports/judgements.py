"""The table with which judge ends, and with which merge ends after joining judge's shards."""

from pathlib import Path
from typing import Any

from .. import log
from ..judging.judge_settings import judged_by
from ..judging.replies import CUT
from ..judging.summary import INDIFFERENT, Summary
from ..outputs.manifests import read_manifest
from . import checks, grades, tables, tournaments
from .collect import CheckedJudge

_MOSTLY = 0.9  # of the probabilities


def show(options: dict[str, Any], out: str, metrics: dict[str, Any]) -> None:
    """Print judge's metrics on stdout, and comparisons as log lines; `options` are judge's, by their recipe names."""
    caption = f"Judge: {judged_by(read_manifest(out), metrics.get('people', ()), options['criterion'])}"
    criteria = metrics.get("by_criterion") or {options["criterion"]: metrics}  # several of a rubric
    if checked := metrics.get("check"):
        _show_check(checked, out, caption)
        return
    if any("grades" in of_criterion for of_criterion in criteria.values()):
        for name, of_criterion in criteria.items():
            grades.show(options | {"criterion": name}, out, of_criterion, caption)
        return
    if "candidates" in metrics:
        tournaments.show(metrics, Path(out).name, caption)
    else:
        _show_wins(options, criteria, caption)
    for name, of_criterion in criteria.items():
        _tell(options, out, of_criterion, f"{name}: " if len(criteria) > 1 else "")


def _show_wins(options: dict[str, Any], criteria: dict[str, dict[str, Any]], caption: str) -> None:
    """The table of A's wins over B, of a rubric with the metrics of each criterion after its name."""
    names = [Path(p).name for p in options["candidates"]] + ["reference"]
    within = bool(options.get("within"))  # absent in manifests of older versions
    a_over_b = "lower k over higher" if within else "A over B"
    shown: dict[str, Summary] = {}
    for criterion, metrics in criteria.items():
        several = len(criteria) > 1
        named = {criterion if several else a_over_b: metrics.get("summary"), "canary over B": metrics.get("canary")}
        found = {name: summary for name, summary in named.items() if summary} | metrics.get("people", {})
        found |= {f"  {n} {s[n]:g}": s for n in ("temperature", "step") for s in metrics.get(f"by_{n}", [])}
        shown |= {name if name == criterion or not several else f"{criterion}: {name}": s for name, s in found.items()}
    if shown:  # a shard may have judged nothing
        title = f"{names[0]} (A) against {names[1]} (B), criterion {options['criterion']}"
        if within:
            title = f"the samples of each prompt in {names[0]}, criterion {options['criterion']}"
        tables.show(tables.judgement_summaries(shown), title, caption=caption)


def _tell(options: dict[str, Any], out: str, metrics: dict[str, Any], of: str) -> None:
    """What is invalid, and how judges and policies compare; `of` names the criterion of a rubric."""
    _say_of_probabilities(metrics.get("summary", {}))
    for name, found in (("", metrics.get("summary", {})), (" of the canary", metrics.get("canary", {}))):
        if reasons := found.get("invalid_reasons"):
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            text = f"{of}{sum(reasons.values())} judgements{name} are invalid ({found['invalid']:.1%}): {counted}"
            tell = log.warn if found["invalid"] > tables.MANY_INVALID else log.say
            more = "; --max-tokens limits thoughts too" if CUT in reasons else ""
            tell(f"{text}; see `raw` in {out}{more}")
    if "compare" in metrics:
        c = metrics["compare"]
        interval = f"{c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})"
        log.say(f"{of}against {options['compare']}: {interval}, p {c['p']:.3f}, {c['n']} prompts")
    for name, person in metrics.get("people", {}).items():
        if person.get("both_bad"):
            log.say(f"{of}{name}: both bad {person['both_bad']} times, counted as ties")
    if alpha := metrics.get("alpha"):
        _say_alpha(alpha, of)
    agreements = {f"of {name}": a for name, a in metrics.get("agreement", {}).items()}
    agreements |= {f"with {options['against']}": metrics["against"]} if "against" in metrics else {}
    for name, a in agreements.items():
        if a:
            log.say(f"{of}agreement {name}: {a['raw']:.3f}, kappa {a['kappa']:.3f} over {a['n']} comparisons")
    if c := metrics.get("calibration"):
        title = f"Calibration against {options['against']}, by the judge's confidence"
        tables.show(tables.calibration(c["bins"]), title)
        log.say(f"{of}calibration: Brier score {c['brier']:.3f}, error {c['error']:.3f} over {c['n']} comparisons")


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


def _show_check(metrics: dict[str, Any], out: str, caption: str) -> None:
    """The table of judge --check, and what was found in one sentence."""
    shown = CheckedJudge(out, metrics)
    tables.show(checks.table(metrics), f"Check of {shown.title}", left=["verdict"], caption=caption)
    log.say(f"{metrics['judge']}: {checks.conclusion(metrics)}")
    if metrics["invalid"] > tables.MANY_INVALID:
        log.warn(f"{metrics['invalid']:.1%} of the answers are invalid; see `raw` in {out}")


def _say_alpha(alpha: dict[str, Any], of: str) -> None:
    over = f"of {alpha['judges']} people, over {alpha['n']} comparisons that two or more answered"
    if alpha["nominal"] is None:
        log.say(f"{of}Krippendorff's alpha {over} is not defined: all answers are equal")
        return
    low, high = alpha["interval"]
    log.say(
        f"{of}Krippendorff's alpha {over}: {alpha['nominal']:.3f} ({low:.3f} to {high:.3f}), "
        f"with ties between a and b {alpha['ordinal']:.3f}"
    )
