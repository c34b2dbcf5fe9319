"""The report's page: one HTML file that needs nothing beside it."""

import html
from pathlib import Path

from . import frontier, tables
from .collect import Collected

_SHOWN = 12  # prompts in the side-by-side

_STYLE = """
:root { --ink: #1c2128; --soft: #5c6670; --page: #fdfdfc; --line: #dfe3e8; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --page: #15181c; --line: #343b44; --card: #1d2228; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 68rem;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.6rem; }
p.note, figcaption { color: var(--soft); font-size: .92rem; } nav a { margin-right: 1.1rem; }
a { color: #2b7bb9; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .samples th, .samples td { text-align: left; } th { font-weight: 600; }
figure { margin: 1.2rem 0; } figure svg { background: #fff; border-radius: 8px; padding: .5rem; width: 100%; height: auto;
       max-width: 46rem; }
.samples td { min-width: 14rem; } .score { font-size: .78rem; border-radius: 4px; padding: .05rem .4rem; color: #111; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; }
pre { font-size: .82rem; overflow-x: auto; }
"""


def write(collected: Collected, figures: list[tuple[str, str, list[Path]]], title: str, out: Path) -> str:
    """The page's HTML: the tables, the figures (SVG within the page), samples side by side, options of each run."""
    parts = [("evaluation", "Evaluation", _evaluation(collected)), ("wins", "Win rates", _wins(collected)),
             ("figures", "Figures", _figures(figures)),
             ("samples", "Samples side by side", _samples(collected)), ("cost", "Cost", _cost(collected)),
             ("runs", "Runs", _runs(collected))]  # fmt: skip
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in parts)
    body = "".join(f'<h2 id="{key}">{name}</h2>\n{content}\n' for key, name, content in parts)
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
            f"<nav>{links}</nav>\n{body}</body></html>\n")  # fmt: skip


def _table(rows: tables.Rows, kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1])
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _evaluation(collected: Collected) -> str:
    last = [run.points[-1] for run in collected.runs if run.points]
    points = collected.evaluations or last
    if not points:
        return ""
    scorers = ", ".join(sorted({p.get("scorer", "") for p in points}))
    note = f"± is one standard error over prompts. Lengths in tokens. Reward by {html.escape(scorers)}."
    if any(p["method"] == "best-of-n" for p in points):
        note += " Best-of-n is the unbiased estimate over all samples; its KL is the bound log n − (n − 1)/n."
    shown = _table(tables.evaluations(points)) + f'<p class="note">{note}</p>'
    if spread := tables.seeds(collected):
        note = "Training seeds: runs that differ in nothing else. Sampling seeds: one model, evaluated again."
        shown += _table(spread) + f'<p class="note">{note}</p>'
    return shown + _flags(collected)


def _wins(collected: Collected) -> str:
    if not collected.judged:
        return ""
    judges = html.escape(", ".join(dict.fromkeys(f"{j.judge} ({j.criterion})" for j in collected.judged)))
    note = (
        f"Judged by {judges}. A tie is half a win; flips: share of comparisons whose verdict turns with the order; words: "
        "mean lengths of both sides; at equal length: the win rate of a logistic model on the length difference, read at 0."
    )
    return _table(tables.win_rates(collected.judged)) + f'<p class="note">{note}</p>'


def _flags(collected: Collected) -> str:
    flagged = frontier.above_optimum(collected)
    if not flagged:
        return ""
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in flagged)
    note = (
        "More than two standard errors above the estimated optimum, which lies low at finite samples: look into these."
    )
    return f'<p class="note">{note}</p><ul class="note">{listed}</ul>'


def _figures(figures) -> str:
    shown = []
    for name, caption, (_, svg) in figures:
        drawing = svg.read_text(encoding="utf-8")
        drawing = drawing[drawing.index("<svg") :]
        # ids are unique within a figure only, and the page holds several
        for attribute in ('id="', 'href="#', "url(#"):
            drawing = drawing.replace(attribute, f"{attribute}{name}-")
        shown.append(f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return "\n".join(shown)


def _samples(collected: Collected) -> str:
    """The first prompts that all files share, in file order: nothing is picked."""
    if not collected.samples:
        return ""
    common = [p for p in collected.samples[0].rows if all(p in s.rows for s in collected.samples)][:_SHOWN]
    head = "<th>prompt</th>" + "".join(f"<th>{html.escape(s.name)}</th>" for s in collected.samples)
    rows = []
    for prompt_id in common:
        prompt = collected.samples[0].rows[prompt_id]["prompt"]
        shown = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        cells = "".join(f"<td>{_sample(s.rows[prompt_id])}</td>" for s in collected.samples)
        rows.append(f"<tr><td>{html.escape(shown)}</td>{cells}</tr>")
    note = (
        f"The first {len(common)} prompts of the file, sample k = 0 of each, not picked. ⏎ marks one cut at the limit."
    )
    return (f'<p class="note">{note}</p><div class="scroll"><table class="samples"><tr>{head}</tr>'
            f"{''.join(rows)}</table></div>")  # fmt: skip


def _sample(row: dict) -> str:
    text = html.escape(row["completion"] if isinstance(row["completion"], str) else str(row["completion"]))
    text += " ⏎" if row.get("finish") == "length" else ""
    score = row.get("score")
    if score is None:
        return text
    hue = f"hsl({round(30 + 170 * min(1.0, max(0.0, score)))} 70% 72%)"
    return f'<span class="score" style="background:{hue}">{score:.2f}</span> {text}'


def _cost(collected: Collected) -> str:
    if not collected.costs:
        return ""
    note = "FLOPs are estimated as 6 (training) or 2 (generation) per parameter and token."
    shown = _table(tables.costs(collected)) + f'<p class="note">{note}</p>'
    if compared := tables.dpo_against_rlhf(collected):
        shown += _table(compared) + '<p class="note">One run of each; means where there are several.</p>'
    return shown


def _runs(collected: Collected) -> str:
    shown = []
    for run in collected.runs:
        mark = "" if run.manifest else " (unfinished)"
        options = "\n".join(f"{k}: {v}" for k, v in run.options.items())
        shown.append(f"<details><summary>{html.escape(run.name)}: {html.escape(run.stage)}{mark}</summary>"
                     f"<pre>{html.escape(options)}</pre></details>")  # fmt: skip
    return "".join(shown)
