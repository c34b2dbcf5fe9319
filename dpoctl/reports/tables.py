"""Tables of a report, as plain rows that both the page and the terminal show."""

from pathlib import Path

from rich.table import Table

from .collect import Collected

Rows = tuple[list[str], list[list[str]]]


def evaluations(points: list[dict]) -> Rows:
    """Reward, KL, lengths and fluency of evaluated models; ± is one standard error over prompts."""
    head = ["model", "reward", "KL", "KL exact", "length", "ended", "ppl ref", "distinct-1/2/3", "loops", "n"]
    rows = []
    for p in points:
        distinct = "/".join(f"{p[f'distinct_{n}']:.2f}" for n in (1, 2, 3) if f"distinct_{n}" in p)
        ppl = f"{p['perplexity_ref']:.2f}" if p.get("perplexity_ref") else "–"
        row = [Path(p["model"]).name, _pm(p, "reward", 3), _pm(p, "kl", 2), _pm(p, "kl_exact", 2), _pm(p, "length", 1)]
        share = [f"{p['ended']:.0%}" if "ended" in p else "–", ppl, distinct or "–"]
        rows.append([*row, *share, f"{p['repetition']:.1%}" if "repetition" in p else "–", str(p["n"])])
    return head, rows


def costs(collected: Collected) -> Rows:
    """What each stage cost, from its manifest."""
    head = ["work", "stage", "seconds", "tokens", "FLOPs (est.)", "peak memory", "device"]
    rows = []
    for name, manifest in collected.costs:
        cost = manifest.get("cost", {})
        tokens = f"{cost['tokens']:,}" if cost.get("tokens") else "–"
        flops = f"{cost['flops']:.1e}" if cost.get("flops") else "–"
        memory = f"{cost['peak_memory_bytes'] / 1e9:.2f} GB" if cost.get("peak_memory_bytes") else "–"
        rows.append(
            [
                name,
                manifest["stage"],
                f"{cost.get('wall_seconds', 0):.0f}",
                tokens,
                flops,
                memory,
                cost.get("device", "–"),
            ]
        )
    return head, rows


def terminal(rows: Rows, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows[1]:
        table.add_row(*row)
    return table


def _pm(point: dict, name: str, digits: int) -> str:
    value, error = point.get(name), point.get(f"{name}_se")
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
