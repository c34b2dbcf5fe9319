"""Which of two candidates is better, by a language model, a scorer or people: judgements, and a summary of A's wins."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import log
from ..artifacts import Work, write_atomic
from ..config import Judge
from ..data.jsonl import read_jsonl
from ..data.writer import WaveWriter
from ..errors import InputError, Interrupted
from ..judging import comparisons, form, people, statistics
from ..judging.client import CostReached
from ..judging.judges import JUDGES
from ..judging.prompts import CRITERIA, Criterion, load_criterion
from ..judging.summary import agreement, by_prompt, figures_of

_WAVE = 64  # comparisons written together
_MANY_INVALID = 0.1


def run(config: Judge, work: Work) -> None:
    criterion = load_criterion(config.criterion, config.thing)  # refused before anything is loaded or paid
    asked, counts = comparisons.load(config)
    if config.form:
        _write_form(config, work, people.items(config, asked), criterion)
        return
    writer, cost = (_by_people if config.backend == "human" else _by_judge)(config, work, asked)
    rows = [row for _, row in read_jsonl(work.out.with_name(work.out.name + ".partial"))]
    figures = counts | _compared(config, figures_of(rows), [row for row in rows if not row.get("canary")])
    writer.finish(figures, cost)
    _show(config, figures)
    if cost:
        dollars = f", {cost['dollars']:.4f} dollars" if "dollars" in cost else ""
        known = f"; {cost['from_cache']} answers were known from before" if cost["from_cache"] else ""
        log.say(f"{cost['prompt_tokens']} tokens asked, {cost['completion_tokens']} answered{dollars}{known}")


def _by_judge(config: Judge, work: Work, asked: list[comparisons.Comparison]) -> tuple[WaveWriter, dict]:
    """Write every judgement, wave by wave. Raises Interrupted where some are pending, InputError at --max-cost."""
    writer = WaveWriter(work)
    judge = JUDGES[config.backend](config, writer.state)
    done = min(len(asked), writer.waves_done * _WAVE)
    pending = 0
    with log.progress("judge", len(asked), "comparisons", done) as meter:
        for start in range(done, len(asked), _WAVE):
            wave = asked[start : start + _WAVE]
            try:
                rows = judge.rows(wave)
            except CostReached:
                raise _cost_reached(config, judge.cost(), _judgements(asked)) from None
            if not rows:  # the server is down: to try everything else as patiently would take hours
                pending += _judgements(asked[start:])
                break
            pending += _judgements(wave) - len(rows)
            if not pending:  # rows are written in order; what lies behind a gap stays in the cache
                writer.write_wave(rows, state=judge.state())
            meter.advance(len(wave), **judge.figures())
    if pending:
        raise Interrupted(
            f"{pending} judgements are pending: {judge.last_failure}; the rest is kept",
            hint="the same command again asks for these alone",
        )
    return writer, judge.cost()


def _judgements(asked: list[comparisons.Comparison]) -> int:
    return sum(len(c.orders) for c in asked)


def _cost_reached(config: Judge, cost: dict, total: int) -> InputError:
    answers = cost["asked"] + cost["from_cache"]
    return InputError(
        f"--max-cost {config.max_cost:g} is reached: {cost['dollars']:.4f} dollars for {answers} answers, "
        f"{total - answers} are left",
        hint="the same command with a higher --max-cost continues; answers are kept",
    )


# --- people


def _write_form(config: Judge, work: Work, items: list[dict], criterion: Criterion) -> None:
    if not criterion.question:
        raise InputError(
            f"--criterion {config.criterion}: a template is for models; people are asked a question",
            hint=f"one of {', '.join(CRITERIA)}",
        )
    Path(config.form).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(config.form, form.page(items, criterion.question, criterion.thing))
    work.plan_path.unlink(missing_ok=True)  # --out is begun when answers are read
    log.say(
        f"{config.form}: {len(items)} blinded comparisons. Open it in a browser, answer by keyboard, export; then the "
        "same command with --answers FILE instead of --form"
    )


def _by_people(config: Judge, work: Work, asked: list[comparisons.Comparison]) -> tuple[WaveWriter, dict]:
    """Write the answers of the exported files as judgements, one row a person and comparison."""
    rows = [row for own in people.judgements(config, asked).values() for row in own]
    writer = WaveWriter(work)
    writer.write_wave(rows, state={})
    return writer, {}


# --- beside other judgements


def _compared(config: Judge, figures: dict, rows: list[dict]) -> dict:
    """The figures with those against another policy's judgements (--compare) and another judge's (--against)."""
    if config.compare:
        other = _read(config.compare)
        if names := {row.get("criterion", config.criterion) for row in other} - {config.criterion}:
            log.warn(f"{config.compare}: judged by {', '.join(sorted(names))}, not by {config.criterion}")
        try:
            figures["compare"] = statistics.paired_difference(by_prompt(rows), by_prompt(other), config.seed)
        except ValueError:
            raise InputError(
                f"{config.compare}: judges none of these prompts", "both must judge the same prompts"
            ) from None
    if config.against:
        other, name = _read(config.against), Path(config.against).name
        figures["against"] = agreement(rows, other)
        if figures["against"] is None:
            raise InputError(f"{config.against}: judges none of these comparisons", "they match by prompt_id and k")
        for person in figures.get("people", ()):
            own = agreement([row for row in rows if row["judge"] == person], other)
            figures.setdefault("agreement", {})[f"{person} and {name}"] = own
    return figures


def _read(path: str) -> list[dict]:
    """The judgements of another file, its canary's left out."""
    rows = []
    for line, row in read_jsonl(path):
        for name in ("prompt_id", "k", "verdict"):
            if name not in row:
                raise InputError(f"{path}:{line}: field '{name}': expected a judgement's, got nothing")
        if row["verdict"] not in ("a", "b", "tie", "invalid"):
            raise InputError(f"{path}:{line}: field 'verdict': expected a, b, tie or invalid, got {row['verdict']!r}")
        if not row.get("canary"):
            rows.append(row)
    return rows


# --- what is shown


def _show(config: Judge, figures: dict) -> None:
    names = [Path(p).name for p in config.candidates] + ["reference"]
    table = Table(title=f"{names[0]} (A) against {names[1]} (B), criterion {config.criterion}", title_justify="left")
    for name in ("", "win rate", "95 %", "win / tie / loss", "flips", "invalid", "words A / B", "at equal length"):
        table.add_column(name, justify="left" if not name else "right")
    shown = {"A over B": figures["summary"]} | ({"canary over B": figures["canary"]} if "canary" in figures else {})
    shown |= figures.get("people", {})
    shown |= {f"  {n} {s[n]:g}": s for n in ("temperature", "step") for s in figures.get(f"by_{n}", [])}
    for name, s in shown.items():
        table.add_row(
            name,
            _rate(s["win_rate"]),
            "–" if not s["interval"] else f"{s['interval'][0]:.3f} to {s['interval'][1]:.3f}",
            f"{s['wins']} / {s['ties']} / {s['losses']}",
            _rate(s["flips"]),
            _rate(s["invalid"]),
            f"{s['length_a']:.1f} / {s['length_b']:.1f}",
            _rate(s["length_controlled"]),
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    if figures["summary"]["invalid"] > _MANY_INVALID:
        log.warn(f"{figures['summary']['invalid']:.0%} of the answers hold no verdict: see `raw` in {config.out}")
    if "compare" in figures:
        c = figures["compare"]
        log.say(
            f"against {config.compare}: {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f}), p {c['p']:.3f}, "
            f"{c['n']} prompts"
        )
    agreements = {f"of {name}": a for name, a in figures.get("agreement", {}).items()}
    agreements |= {f"with {config.against}": figures["against"]} if "against" in figures else {}
    for name, a in agreements.items():
        if a:
            log.say(f"agreement {name}: {a['raw']:.3f}, kappa {a['kappa']:.3f} over {a['n']} comparisons")


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def plan(config: Judge) -> dict:
    criterion = load_criterion(config.criterion, config.thing)
    asked, _ = comparisons.load(config)
    shown: dict = {"comparisons": len(asked), "judgements": _judgements(asked)}
    if config.backend == "openai":
        words = sum(len(criterion.request(c.prompt, c.a, c.b, c.key).split()) * len(c.orders) for c in asked)
        tokens = round(words * 1.4)
        shown |= {"tokens asked, about": tokens, "tokens answered, at most": shown["judgements"] * config.max_tokens}
        if config.price_in is not None:
            most = tokens * config.price_in + shown["tokens answered, at most"] * config.price_out
            shown["dollars, at most about"] = f"{most / 1e6:.2f}"
    return shown
