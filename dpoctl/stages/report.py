"""A report of runs, evaluations and samples: an HTML page, PNG and SVG figures, the same numbers on the terminal."""

from pathlib import Path

from .. import log
from ..config.files import Report
from ..outputs.claims import Output
from ..outputs.files import write_atomic
from ..reports import checks, efficiency, figures, frontier, grades, judges, page, rounds, tables, tournaments
from ..reports.collect import Collected, collect


def run(config: Report, output: Output) -> None:
    collected = collect(config.inputs)
    out = Path(config.out)
    drawn = figures.draw(collected, out / "figures")
    write_atomic(out / "report.html", page.write(collected, drawn, config.title))
    files = [out / "report.html", *(path for figure in drawn for path in (figure.png, figure.svg))]
    output.finish([(path, None) for path in files], {"figures": len(drawn)}, {})
    _show(collected)
    log.say(f"report: {out / 'report.html'}")


def _show(collected: Collected) -> None:
    """The tables on stdout, and a warning for each point above the optimum."""
    if collected.final_points:
        tables.show_evaluations(collected.final_points, efficiencies=efficiency.of_table(collected))
        for text in efficiency.told(collected):
            log.say(f"efficiency: {text}")
    if collected.judged:
        tables.show(tables.win_rates(collected.judged), "Win rates", caption=judges.caption(collected.judged))
    for contest in collected.contests:
        tournaments.show(contest.metrics, contest.name, f"Judge: {contest.judged_by}")
    for text in judges.different(collected):
        log.warn(text)
    for checked in collected.checked:
        by = f"Judge: {checked.judged_by}"
        tables.show(checks.table(checked.metrics), f"Check of {checked.title}", left=["verdict"], caption=by)
    if collected.graded:
        by = "\n".join(dict.fromkeys(f"Judge: {graded.judged_by}" for graded in collected.graded))
        tables.show(grades.table(collected.graded), "Grades", caption=by)
    tables.show(tables.costs(collected), "Cost")
    if compared := tables.dpo_against_rlhf(collected):
        tables.show(compared, "DPO against RLHF, one run of each")
    for text in rounds.told(collected):
        log.warn(text)
    for text in frontier.above_optimum(collected):
        log.warn(f"above the optimum: {text}")


def plan(config: Report) -> dict[str, int]:
    collected = collect(config.inputs)
    return {
        "runs": len(collected.runs),
        "evaluations": len(collected.evaluations),
        "completions files": len(collected.samples),
        "judgements files": len(collected.judged) + len(collected.contests),
        "checks of judges": len(collected.checked),
        "graded files": len(collected.graded),
    }
