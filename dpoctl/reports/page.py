"""The report's page: one HTML file without external resources."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import checks, efficiency, frontier, grades, judges, reading, rounds, tables, tournaments
from .collect import CheckedJudge, Collected, Contest
from .figures import SavedFigure

_PROMPTS = 12  # in the table of samples
_TEMPLATES = Environment(
    loader=PackageLoader("dpoctl.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write(collected: Collected, figures: Sequence[SavedFigure], title: str) -> str:
    """The HTML: tables, figures (as SVG within the page), samples side by side, options of each run."""
    points = collected.final_points
    content: dict[str, Any] = {
        "evaluations": tables.evaluations(points, efficiency.of_table(collected)) if points else None,
        "win_rates": tables.win_rates(collected.judged) if collected.judged else None,
        "tournaments": [_tournament(contest) for contest in collected.contests],
        "checks": [_check(c) for c in collected.checked],
        "grades": grades.table(collected.graded) if collected.graded else None,
        "figures": [{"svg": _inline(figure), "caption": figure.caption} for figure in figures],
        "samples": _samples(collected),
        "costs": tables.costs(collected) if collected.costs else None,
        "runs": collected.runs,
    }
    names = {
        "evaluations": ("evaluation", "Evaluation"),
        "win_rates": ("wins", "Win rates"),
        "tournaments": ("tournaments", "Tournaments"),
        "checks": ("checks", "Checks of judges"),
        "grades": ("grades", "Grades"),
        "figures": ("figures", "Figures"),
        "samples": ("samples", "Samples side by side"),
        "costs": ("cost", "Cost"),
        "runs": ("runs", "Runs"),
    }
    return _TEMPLATES.get_template("report.html.j2").render(
        **content,
        title=title,
        sections=[section for part, section in names.items() if content[part]],
        scorers=", ".join(sorted({p.get("scorer", "") for p in points})),
        best_of_n=any(p["method"] == "best-of-n" for p in points),
        seeds=tables.seeds(collected),
        efficiency=efficiency.of_table(collected) is not None,
        without_efficiency=efficiency.told(collected),
        references=rounds.told(collected),
        above_optimum=frontier.above_optimum(collected),
        check_note=checks.NOTE,
        graders=list(dict.fromkeys(str(g.judged_by) for g in collected.graded)),
        judges=judges.caption(collected.judged).split("\n") if collected.judged else [],
        different_judges=judges.different(collected),
        readings=reading.sentences(collected),
        dpo_against_rlhf=tables.dpo_against_rlhf(collected),
    )


def _check(checked: CheckedJudge) -> dict[str, Any]:
    """Title, table and judge of a check."""
    title = f"{checked.name}: {checked.title}"
    return {"title": title, "table": checks.table(checked.metrics), "judge": str(checked.judged_by)}


def _tournament(contest: Contest) -> dict[str, Any]:
    """Tables and notes of a tournament."""
    return {
        "name": contest.name,
        "scores": tournaments.scores(contest.metrics),
        "matrix": tournaments.matrix(contest.metrics),
        "judge": str(contest.judged_by),
        "baseline": contest.metrics["baseline"],
        "told": tournaments.told(contest.metrics),
    }


def _inline(figure: SavedFigure) -> str:
    """The figure's <svg> element, with ids that are unique in the page, not only in the figure."""
    svg = figure.svg.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.name}-", svg)


@dataclass(frozen=True)
class SampleCell:
    """A completion as the table shows it; `score` is None where the file has none."""

    text: str
    cut: bool
    score: str | None
    colour: str


@dataclass(frozen=True)
class SampleRow:
    prompt: str
    cells: list[SampleCell]


@dataclass(frozen=True)
class SampleTable:
    names: list[str]
    rows: list[SampleRow]


def _samples(collected: Collected) -> SampleTable | None:
    """The first prompts that all completions files share, in the order of the first file."""
    if not collected.samples:
        return None
    first = collected.samples[0].rows
    shared = [p for p in first if all(p in s.rows for s in collected.samples)][:_PROMPTS]
    rows = [SampleRow(_text(first[p]["prompt"]), [_cell(s.rows[p]) for s in collected.samples]) for p in shared]
    return SampleTable([s.name for s in collected.samples], rows)


def _cell(row: dict) -> SampleCell:
    completion, score = row["completion"], row.get("score")
    text = completion if isinstance(completion, str) else str(completion)
    hue = 30 + 170 * min(1.0, max(0.0, score or 0.0))  # from orange at 0 to green and blue at 1
    shown = None if score is None else f"{score:.2f}"
    return SampleCell(text, row.get("finish") == "length", shown, f"hsl({hue:.0f} 70% 72%)")


def _text(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message.get("content") or "" for message in prompt)
