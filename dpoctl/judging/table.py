"""The figures of a judgements file on the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import log

_MANY_INVALID = 0.1


def show(options: dict[str, Any], out: str, metrics: dict[str, Any]) -> None:
    """Print the table of judge's `figures`, and what stands beside it; `options` are judge's, by their names in recipes."""
    names = [Path(p).name for p in options["candidates"]] + ["reference"]
    table = Table(
        title=f"{names[0]} (A) against {names[1]} (B), criterion {options['criterion']}", title_justify="left"
    )
    for name in ("", "win rate", "95 %", "win / tie / loss", "flips", "invalid", "words A / B", "at equal length"):
        table.add_column(name, justify="left" if not name else "right")
    named = {"A over B": metrics.get("summary"), "canary over B": metrics.get("canary")}
    shown = {name: summary for name, summary in named.items() if summary} | metrics.get("people", {})
    shown |= {f"  {n} {s[n]:g}": s for n in ("temperature", "step") for s in metrics.get(f"by_{n}", [])}
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
    if shown:  # a shard may have judged nothing
        console = Console()
        (console if console.is_terminal else Console(width=140)).print(table)
    if metrics.get("summary", {}).get("invalid", 0) > _MANY_INVALID:
        log.warn(f"{metrics['summary']['invalid']:.0%} of the answers hold no verdict: see `raw` in {out}")
    if "compare" in metrics:
        c = metrics["compare"]
        log.say(
            f"against {options['compare']}: {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f}), p {c['p']:.3f}, "
            f"{c['n']} prompts"
        )
    agreements = {f"of {name}": a for name, a in metrics.get("agreement", {}).items()}
    agreements |= {f"with {options['against']}": metrics["against"]} if "against" in metrics else {}
    for name, a in agreements.items():
        if a:
            log.say(f"agreement {name}: {a['raw']:.3f}, kappa {a['kappa']:.3f} over {a['n']} comparisons")


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
