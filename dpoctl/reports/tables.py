"""Tables of a report, as plain rows that both the page and the terminal show."""

import math
from pathlib import Path

from rich.table import Table

from .collect import Collected, Judged

Rows = tuple[list[str], list[list[str]]]


def evaluations(points: list[dict]) -> Rows:
    """Reward, KL, lengths and fluency of evaluated models; ± is one standard error over prompts."""
    head = ["model", "reward", "KL", "KL exact", "length", "ended", "ppl ref", "distinct-1/2/3", "loops", "n"]
    rows = []
    for p in points:
        if p["method"] == "optimum":  # a curve of many points: drawn
            continue
        distinct = "/".join(f"{p[f'distinct_{n}']:.2f}" for n in (1, 2, 3) if f"distinct_{n}" in p)
        ppl = f"{p['perplexity_ref']:.2f}" if p.get("perplexity_ref") else "–"
        name = f"best of {p['options']['n']}" if p["method"] == "best-of-n" else Path(p["model"]).name
        row = [name, _pm(p, "reward", 3), _pm(p, "kl", 2), _pm(p, "kl_exact", 2), _pm(p, "length", 1)]
        share = [f"{p['ended']:.0%}" if "ended" in p else "–", ppl, distinct or "–"]
        rows.append([*row, *share, f"{p['repetition']:.1%}" if "repetition" in p else "–", str(p["n"])])
    return head, rows


def win_rates(judged: list[Judged]) -> Rows:
    """Who wins against whom, at each temperature where there are several, at the last training step."""
    head = [
        "policy",
        "against",
        "win rate",
        "95 %",
        "win / tie / loss",
        "flips",
        "invalid",
        "words",
        "at equal length",
        "n",
    ]
    rows = []
    for j in judged:
        last = [s | {"label": f"{j.name}, update {s['step']}"} for s in j.by_step[-1:]]
        each = [s | {"label": f"{j.name}, T = {s['temperature']:g}"} for s in j.by_temperature]
        for s in last or each or [j.summary]:
            interval = f"{s['interval'][0]:.3f} to {s['interval'][1]:.3f}" if s["interval"] else "–"
            rows.append([s.get("label", j.name), j.against, _share(s["win_rate"]), interval,
                         f"{s['wins']} / {s['ties']} / {s['losses']}", _share(s["flips"]), _share(s["invalid"]),
                         f"{s['length_a']:.1f} / {s['length_b']:.1f}", _share(s["length_controlled"]), str(s["n"])])  # fmt: skip
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


def dpo_against_rlhf(collected: Collected) -> Rows | None:
    """Time, FLOPs and memory of one DPO run against a reward model and one PPO run on it; means over runs."""
    by_stage: dict[str, list[dict]] = {}
    for _, manifest in collected.costs:
        learned = manifest["stage"] != "train-ppo" or manifest["metrics"].get("method", "ppo") == "ppo"
        if learned:
            by_stage.setdefault(manifest["stage"], []).append(manifest["cost"])
    if not all(by_stage.get(stage) for stage in ("train-dpo", "train-rm", "train-ppo")):
        return None

    def mean(stage: str, name: str) -> float:
        return sum(cost.get(name) or 0 for cost in by_stage[stage]) / len(by_stage[stage])

    rows = []
    for what, name, scale, unit in (
        ("wall time", "wall_seconds", 1.0, "s"),
        ("FLOPs (est.)", "flops", 1e12, "TFLOP"),
        ("peak memory", "peak_memory_bytes", 1e9, "GB"),
    ):
        dpo, rm, ppo = (mean(stage, name) / scale for stage in ("train-dpo", "train-rm", "train-ppo"))
        rlhf = max(rm, ppo) if name == "peak_memory_bytes" else rm + ppo
        ratio = f"{rlhf / dpo:.1f}×" if dpo else "–"
        rows.append([what, *(f"{v:.2f} {unit}" if v < 100 else f"{v:.0f} {unit}" for v in (dpo, rm, ppo, rlhf)), ratio])
    return ["", "DPO", "reward model", "PPO", "reward model + PPO", "RLHF / DPO"], rows


def seeds(collected: Collected) -> Rows | None:
    """Spread of the final reward over training seeds (runs that differ in nothing else), and over sampling seeds.

    The latter are evaluations of one model more than once.
    """
    groups: dict[str, list[tuple[int, dict]]] = {}
    for p in (run.points[-1] for run in collected.runs if run.points):
        options = {k: v for k, v in (p.get("options") or {}).items() if k != "seed"}
        groups.setdefault(f"{p['method']} {options}", []).append(((p.get("options") or {}).get("seed"), p))
    resampled: dict[str, list[tuple[int, dict]]] = {}
    for i, p in enumerate(p for p in collected.evaluations if p["method"] not in ("best-of-n", "optimum")):
        resampled.setdefault(p["model"], []).append((i, p))
    rows = []
    for kind, own in [*(("training", g) for g in groups.values()), *(("sampling", g) for g in resampled.values())]:
        if len({seed for seed, _ in own}) < 2:
            continue
        rewards = [p["reward"] for _, p in own]
        mean = sum(rewards) / len(rewards)
        spread = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        error = sum(p["reward_se"] for _, p in own) / len(own)
        names = ", ".join(dict.fromkeys(Path(p["model"]).name for _, p in own))
        rows.append([names, kind, f"{mean:.3f}", f"{spread:.3f}", f"{error:.3f}", str(len(own))])
    return (
        (["runs", "seeds of", "mean reward", "sd over seeds", "one run's standard error", "seeds"], rows)
        if rows
        else None
    )


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
    return f"{value:.{digits}f}" + ("" if error is None or math.isnan(error) else f" ± {error:.{digits}f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
