"""Tables as plain rows of text, which the report's page and the terminal both show."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console, OverflowMethod
from rich.table import Table

from ..judging.statistics import wilson
from ..judging.summary import Summary
from . import efficiency, rounds
from .collect import Collected, Judged
from .efficiency import Efficiency
from .origins import Point
from .settings import keys_of

NONE = "–"
_PIPE_WIDTH = 150  # columns where stdout is no terminal, so that no row wraps


class Rows(NamedTuple):
    """A table: the column names, and one list of cells per row. The first column is aligned left, the others right."""

    head: list[str]
    rows: list[list[str]]


# --- on the terminal


def show(table: Rows, title: str, console: Console | None = None, left: Sequence[str] = (), caption: str = "") -> None:
    """Print a table on stdout, or on `console`, with a caption below it; columns named in `left` hold text, and are
    aligned left."""
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=_PIPE_WIDTH)
    drawn = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for i, name in enumerate(table.head):
        overflow: OverflowMethod = "fold" if i == 0 else "ellipsis"  # what follows a long name tells it from others
        drawn.add_column(name, justify="left" if i == 0 or name in left else "right", overflow=overflow)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)


def show_evaluations(
    points: Sequence[dict], console: Console | None = None, efficiencies: Sequence[Efficiency] | None = None
) -> None:
    """Print the table of evaluation rows with which evaluate, merge and report end."""
    show(evaluations(points, efficiencies), "Evaluation (± one standard error over prompts)", console)


# --- evaluations


def evaluations(points: Sequence[dict], efficiencies: Sequence[Efficiency] | None = None) -> Rows:
    """Reward, KL (nats), lengths (tokens) and fluency of evaluated models; ± is one standard error over prompts.

    With `efficiencies`, one of each point, there is a column of them. The points of an optimum are left out: they are a
    curve, which the report draws.
    """
    head = ["model", "reward", "KL", "KL exact", "length", "ended", "ppl ref", "distinct-1/2/3", "loops", "n"]
    found = [(i, _evaluation(p)) for i, p in enumerate(points) if p["method"] != "optimum"]
    if efficiencies is None:
        return Rows(head, [row for _, row in found])
    at = head.index("length")
    rows = [[*row[:at], _efficiency(efficiencies[i]), *row[at:]] for i, row in found]
    return Rows([*head[:at], "efficiency", *head[at:]], rows)


def _efficiency(found: Efficiency) -> str:
    if found.value is None:
        return NONE
    error = "" if math.isnan(found.error) else f" ± {found.error:.1%}"
    return f"{'≥ ' if found.at_least else ''}{found.value:.1%}{error}"


def _evaluation(point: dict) -> list[str]:
    distinct = "/".join(f"{point[f'distinct_{n}']:.3f}" for n in (1, 2, 3) if f"distinct_{n}" in point)
    return [
        efficiency.name_of_point(point),
        _with_error(point, "reward", 3),
        _with_error(point, "kl", 2),
        _with_error(point, "kl_exact", 2),
        _with_error(point, "length", 1),
        f"{point['ended']:.0%}" if "ended" in point else NONE,
        f"{point['perplexity_ref']:.2f}" if point.get("perplexity_ref") else NONE,
        distinct or NONE,
        f"{point['repetition']:.1%}" if "repetition" in point else NONE,
        str(point["n"]),
    ]


def _with_error(point: dict, name: str, digits: int) -> str:
    value, error = point.get(name), point.get(f"{name}_se")
    if value is None:
        return NONE
    return f"{value:.{digits}f}" + ("" if error is None or math.isnan(error) else f" ± {error:.{digits}f}")


def seeds(collected: Collected) -> Rows | None:
    """Means of final policies over training seeds and over sampling seeds; None where nothing was repeated.

    Training seeds: runs that differ in nothing else, from one reference or each from its own. Sampling seeds:
    evaluations of one model more than once. ± is the standard deviation over the seeds.
    """
    key_of, curves = keys_of(collected), efficiency.curves(collected)
    groups: dict[tuple[str, str], list[tuple[Any, Point]]] = defaultdict(list)
    for p in (run.final_point for run in rounds.without_later(collected.runs) if run.points):
        options = p.get("options") or {}
        others = {k: v for k, v in options.items() if k != "seed"}
        groups["training", f"{p['method']} {others} {key_of([p])}"].append((options.get("seed"), p))
    for i, p in enumerate(p for p in collected.evaluations if p["method"] not in ("best-of-n", "optimum")):
        beta = (p.get("options") or {}).get("ilql_beta")
        groups["sampling", f"{p.origin.policy or p.origin.reference or p['model']} {beta}"].append((i, p))
    rows = [
        _spread(kind, [p for _, p in group], curves)
        for (kind, _), group in groups.items()
        if len({seed for seed, _ in group}) > 1
    ]
    head = ["runs", "seeds of", "mean reward", "standard error of one run", "mean KL", "mean efficiency", "seeds"]
    return Rows(head, rows) if rows else None


def _spread(kind: str, points: list[Point], curves: Sequence[efficiency.Curve]) -> list[str]:
    names = list(dict.fromkeys(map(efficiency.name_of_point, points)))
    last = {name.rpartition("/")[2] for name in names}
    kls = [p.get("kl") if p.get("kl_exact") is None else p["kl_exact"] for p in points]
    shares = [efficiency.efficiency(p, curves) for p in points]
    bound = "≥ " if any(share.at_least for share in shares) else ""  # the mean of lower bounds is one too
    return [
        last.pop() if len(last) == 1 else ", ".join(names),
        kind,
        _over_seeds([p["reward"] for p in points], ".3f"),
        f"{sum(p['reward_se'] for p in points) / len(points):.3f}",
        _over_seeds(kls, ".2f"),
        bound + _over_seeds([share.value for share in shares], ".1%"),
        str(len(points)),
    ]


def _over_seeds(values: Sequence[float | None], form: str) -> str:
    """Mean and standard deviation of values; none where one is missing."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return NONE
    return f"{statistics.fmean(known):{form}} ± {statistics.stdev(known):{form}}"


# --- judgements


def win_rates(judged: Iterable[Judged]) -> Rows:
    """Who wins against whom: at each temperature where there are several, or at the last of several training steps."""
    rows = []
    for j in judged:
        for s in _shown(j):
            label = f"{j.name}, update {s['step']}" if "step" in s else j.name
            label += f", T = {s['temperature']:g}" if "temperature" in s else ""
            rows.append([label, j.against, *_summary(s), str(s["n"])])
    return Rows(["policy", "against", *_SUMMARY_HEAD, "n"], rows)


def _shown(judged: Judged) -> list[Summary]:
    return judged.by_step[-1:] or judged.by_temperature or [judged.summary]


def judgement_summaries(summaries: dict[str, Summary]) -> Rows:
    """One row for each named summary of one judgements file."""
    return Rows(["", *_SUMMARY_HEAD], [[name, *_summary(summary)] for name, summary in summaries.items()])


def calibration(bins: Iterable[Sequence[float]]) -> Rows:
    """One row for each bin of a judge's confidence."""
    rows = []
    for confidence, agreement, n in bins:
        low, high = wilson(agreement, int(n))
        rows.append([f"{confidence:.3f}", f"{agreement:.3f}", f"{low:.3f} to {high:.3f}", str(int(n))])
    return Rows(["mean confidence", "agreement", "95 %", "comparisons"], rows)


MANY_INVALID = 0.1  # the share of judgements from which on it is warned of
_SUMMARY_HEAD = ["win rate", "95 %", "win / tie / loss", "flips", "invalid", "words A / B", "at equal length"]


def _summary(summary: Summary) -> list[str]:
    interval = summary["interval"]
    return [
        _share(summary["win_rate"]),
        f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else NONE,
        f"{summary['wins']} / {summary['ties']} / {summary['losses']}",
        _share(summary["flips"]),
        _share(summary["invalid"]),
        f"{summary['length_a']:.1f} / {summary['length_b']:.1f}",
        _share(summary["length_controlled"]),
    ]


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


# --- cost


def costs(collected: Collected) -> Rows:
    """What each stage cost, from its manifest."""
    head = ["output", "stage", "seconds", "tokens", "FLOPs (est.)", "peak memory", "device"]
    rows = []
    for name, manifest in collected.costs:
        cost = manifest.get("cost", {})
        tokens = f"{cost['tokens']:,}" if cost.get("tokens") else NONE
        flops = f"{cost['flops']:.1e}" if cost.get("flops") else NONE
        memory = f"{cost['peak_memory_bytes'] / 1e9:.2f} GB" if cost.get("peak_memory_bytes") else NONE
        seconds, device = f"{cost.get('wall_seconds', 0):.0f}", cost.get("device", NONE)
        rows.append([name, manifest["stage"], seconds, tokens, flops, memory, device])
    return Rows(head, rows)


def dpo_against_rlhf(collected: Collected) -> Rows | None:
    """Time, FLOPs and memory of one DPO run against a reward model and one PPO run on it; None where one is missing."""
    means = _mean_costs(collected)
    if means is None:
        return None
    rows = []
    for what, name, as_text in (
        ("wall time", "wall_seconds", lambda seconds: f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"),
        ("FLOPs (est.)", "flops", lambda flops: f"{flops:.1e}"),
        ("peak memory", "peak_memory_bytes", lambda size: f"{size / 1e9:.2f} GB"),
    ):
        values = list(means[name].values())
        ratio = f"{values[-1] / values[0]:.1f}×" if values[0] else NONE
        rows.append([what, *map(as_text, values), ratio])
    return Rows(["", "DPO", "reward model", "PPO", "reward model + PPO", "RLHF / DPO"], rows)


def _mean_costs(collected: Collected) -> dict[str, dict[str, float]] | None:
    """Cost name -> the mean over runs of `dpo`, `reward_model` and `ppo`, and of `rlhf`, the last two together.

    None where one of the three is missing. PPO runs on the ground-truth reward have no reward model: they do not count.
    """
    by_stage: dict[str, list[dict]] = {}
    for _, manifest in collected.costs:
        learned = manifest["stage"] != "train-ppo" or manifest["metrics"].get("method", "ppo") == "ppo"
        if learned:
            by_stage.setdefault(manifest["stage"], []).append(manifest["cost"])
    stages = ("train-dpo", "train-rm", "train-ppo")
    if not all(by_stage.get(stage) for stage in stages):
        return None
    found = {}
    for name in ("wall_seconds", "flops", "peak_memory_bytes"):
        dpo, rm, ppo = (_mean(by_stage[stage], name) for stage in stages)
        rlhf = max(rm, ppo) if name == "peak_memory_bytes" else rm + ppo
        found[name] = {"dpo": dpo, "reward_model": rm, "ppo": ppo, "rlhf": rlhf}
    return found


def _mean(costs: list[dict], name: str) -> float:
    return sum(cost.get(name) or 0 for cost in costs) / len(costs)


# --- as data


def numbers(collected: Collected) -> dict[str, Any]:
    """The numbers of the tables of a report, unformatted; keys without numbers are left out."""
    found: dict[str, Any] = {
        "evaluations": collected.final_points,
        "efficiency": efficiency.numbers(collected),
        "win_rates": [
            {"policy": j.name, "against": j.against, **s, "judged_by": j.judged_by._asdict()}
            for j in collected.judged
            for s in _shown(j)
        ],
        "tournaments": [{"file": c.name, **c.metrics, "judged_by": c.judged_by._asdict()} for c in collected.contests],
        "checks": [{"file": c.name, **c.metrics} for c in collected.checked],
        "grades": [{"policy": g.name, "criterion": g.criterion, **g.summary} for g in collected.graded],
        "judge_calibration": [{"policy": j.name, **j.calibration} for j in collected.judged if j.calibration],
        "costs": [{"output": name, "stage": m["stage"], **m.get("cost", {})} for name, m in collected.costs],
        "dpo_against_rlhf": _mean_costs(collected),
    }
    return {name: value for name, value in found.items() if value}
