"""A report of runs, evaluations and samples: an HTML page, PNG and SVG figures, the same numbers on the terminal."""

from pathlib import Path

from rich.console import Console

from .. import log
from ..config.files import Report
from ..outputs.claims import Output
from ..outputs.files import write_atomic
from ..reports import figures, frontier, page, tables
from ..reports.collect import collect


def run(config: Report, output: Output) -> None:
    collected = collect(config.inputs)
    out = Path(config.out)
    drawn = figures.draw(collected, out / "figures")
    write_atomic(out / "report.html", page.write(collected, drawn, config.title, out))
    files = [out / "report.html", *(path for _, _, paths in drawn for path in paths)]
    output.finish([(path, None) for path in files], {"metrics": len(drawn)}, {})
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    points = collected.evaluations or [r.points[-1] for r in collected.runs if r.points]
    if points:
        console.print(tables.terminal(tables.evaluations(points), "Evaluation (± one standard error over prompts)"))
    if collected.judged:
        console.print(tables.terminal(tables.win_rates(collected.judged), "Win rates"))
    console.print(tables.terminal(tables.costs(collected), "Cost"))
    if compared := tables.dpo_against_rlhf(collected):
        console.print(tables.terminal(compared, "DPO against RLHF, one run of each"))
    for text in frontier.above_optimum(collected):
        log.warn(f"above the optimum: {text}")
    log.say(f"report: {out / 'report.html'}")


def plan(config: Report) -> dict:
    collected = collect(config.inputs)
    return {
        "runs": len(collected.runs),
        "evaluations": len(collected.evaluations),
        "completions files": len(collected.samples),
        "judgements files": len(collected.judged),
    }
