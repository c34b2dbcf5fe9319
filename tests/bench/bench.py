"""dpoctl beside its peers on one machine: in alternation, in processes of their own, as ratios (`make bench`).

A round runs every side of every cell once; the table has medians over the rounds, and ratios of dpoctl to each peer,
taken within a round, with their lowest and highest. Peers are float32 too where the processor has no bfloat16 of its
own, where TRL's default would be some ten times slower than its float32. TRL takes 8 pairs a forward, its default and
its fastest here; dpoctl takes an update's pairs in one, and so does TRL in the row that says so.
`engines` compares the two engines of dpoctl, where an environment with vLLM is there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import inputs

HERE = Path(__file__).parent
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}  # what glibc needs to keep freed memory
PARTS = ("train-dpo", "train-rm", "train-ppo", "sample", "engines")
VLLM = Path(os.environ.get("BENCH_VLLM", ""))  # the interpreter of an environment with vLLM and dpoctl
ENGINE_ROWS = ("64", "1024")
AIMS = {  # by the cell: the ratios of rates aimed at, to each peer in turn
    "train-dpo small i bfloat16": (15, 8),
    "train-dpo small i float32": (10, 4.5),
    "train-dpo small ii bfloat16": (15, 5.5),
    "train-dpo small ii float32": (11, 3.5),
    "train-dpo tiny i bfloat16": (8, 4),
    "train-rm small i bfloat16": (3.5, 3),
    "train-rm small ii bfloat16": (3, 2),
    "train-ppo small bfloat16": (3, 2),
    "train-ppo small float32": (1.6, 1.2),
    "sample small bfloat16": (4.5, 3.5),
    "sample small float32": (2.7,),
}


def cells(only: list[str], models: list[str], data: list[str]) -> list[dict]:
    """What is compared: a name, dpoctl's arguments, the peers' arguments by their name, and the unit of the rates."""
    from dpoctl.runtime.devices import native_bfloat16

    found = []
    dtypes = ("bfloat16", "float32") if native_bfloat16() else ("float32",)
    for part in only:
        for model in models:
            own_data = data if part in ("train-dpo", "train-rm") else ENGINE_ROWS if part == "engines" else ("",)
            for rows in own_data:
                found += [_cell(part, model, rows, dtype) for dtype in dtypes]
    return [c for c in found if c["model"] == "small" or c["part"] in ("train-dpo", "sample")]


def _cell(part: str, model: str, data: str, dtype: str) -> dict:
    folder = inputs.FOLDER / model
    cell = {
        "part": part,
        "model": model,
        "data": data,
        "dtype": dtype,
        "trl": "1.12.0" if part == "train-ppo" else "1.16.0",
    }
    if part == "sample":
        shared = {"model": str(folder), "rows": 64, "tokens": 48}
        return cell | {
            "unit": "tokens/s",
            "ours": shared | {"dtype": dtype},
            "peers": {f"generate {d}": shared | {"dtype": d} for d in dict.fromkeys(("float32", dtype))},
        }
    if part == "engines":
        shared = {"model": str(folder), "rows": int(data), "tokens": 48, "dtype": dtype}
        return cell | {"unit": "tokens/s", "ours": shared, "peers": {"--engine vllm": shared}}
    if part == "train-ppo":
        shared = {"model": str(folder), "episodes": 64, "tokens": 48, "dtype": dtype}
        unit = "updates/s"
    else:
        shared = {
            "model": str(folder),
            "data": str(folder / f"batch.{data}.jsonl"),
            "pairs": inputs.PAIRS[data],
            "steps": 2,
            "dtype": dtype,
        }
        unit = "pairs/s"
    peers = {f"TRL {cell['trl']} {name}": shared | {"tuned": name == "tuned"} for name in ("default", "tuned")}
    if part == "train-ppo":
        return cell | {"unit": unit, "peers": peers, "ours": shared}
    peers = {name: arguments | {"each": 8} for name, arguments in peers.items()}
    if part == "train-dpo" and (model, data) == ("small", "i"):  # elsewhere it takes minutes, or the machine's memory
        name = f"TRL {cell['trl']} tuned"
        peers[f"{name}, one forward"] = peers[name] | {"each": inputs.PAIRS[data]}
    words = inputs.tokens_of_pairs(folder / f"batch.{data}.jsonl") / inputs.PAIRS[data]
    return cell | {"unit": unit, "tokens_per_pair": words, "peers": peers, "ours": shared | {"steps": 5}}


def name_of(cell: dict) -> str:
    return " ".join(filter(None, (cell["part"], cell["model"], cell["data"], cell["dtype"])))


def run_side(script: str, python: str, part: str, arguments: dict, tuned: bool) -> dict:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | (ALLOCATOR if tuned else {})
    done = subprocess.run(
        [python, str(HERE / script), part, json.dumps(arguments)],
        env=environment,
        text=True,
        capture_output=True,
        cwd=HERE,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{script} {part} {arguments}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def matrix_peaks(known: dict[str, float]) -> dict[str, float]:
    """By dtype: operations per second of the best of some products, as far as this machine goes now or went before."""
    return {dtype: max(known.get(dtype, 0.0), _matrix_peak(dtype)) for dtype in ("float32", "bfloat16")}


def _matrix_peak(dtype: str) -> float:
    import torch

    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (1024, 1024, 1024), (1024, 384, 1536), (1024, 1536, 384)):
        a, b = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def compare(cell: dict, rounds: int) -> dict:
    """The cell with its runs by side."""
    python = {"ours": sys.executable, "peer": str(inputs.FOLDER.parent / f"trl-{cell['trl']}" / "bin" / "python")}
    runs: dict[str, list[dict]] = {"dpoctl": []} | {name: [] for name in cell["peers"]}
    for _ in range(rounds):
        own = "sample" if cell["part"] == "engines" else cell["part"]
        runs["dpoctl"].append(run_side("ours.py", python["ours"], own, cell["ours"], False))
        for name, arguments in cell["peers"].items():
            tuned = bool(arguments.get("tuned"))
            side = ("ours.py", str(VLLM)) if cell["part"] == "engines" else ("peers.py", python["peer"])
            part = "vllm" if cell["part"] == "engines" else cell["part"]
            runs[name].append(run_side(*side, part, arguments, tuned))
    return cell | {"runs": runs}


def rate_text(cell: dict, rate: float) -> str:
    if cell["part"] == "train-ppo":
        return f"{1 / rate:.1f} s/update"
    if cell["part"] in ("sample", "engines"):
        return f"{rate:,.0f} tokens/s"
    return f"{rate:.3g} pairs/s, {rate * cell['tokens_per_pair']:,.0f} tokens/s"


def rows_of(cell: dict, peaks: dict[str, float]) -> list[list[str]]:
    """The cell's lines of the table."""
    runs = cell["runs"]
    own = runs["dpoctl"]
    rate, memory, flops = (statistics.median(run[key] for run in own) for key in ("rate", "peak_gb", "flops"))
    share = f"{flops / peaks[cell['dtype']]:.0%} of {cell['dtype']} peak"
    lines = [[name_of(cell), "dpoctl", rate_text(cell, rate), "", "", f"{memory:.2f} GB", "", share]]
    peers = {peer: found for peer, found in runs.items() if peer != "dpoctl"}
    aims = dict(zip(peers, AIMS.get(name_of(cell), ()), strict=False))  # TRL in one forward has none
    for peer, found in peers.items():
        ratios = [a["rate"] / b["rate"] for a, b in zip(own, found, strict=True)]
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        theirs = statistics.median(run["peak_gb"] for run in found)
        same = ""
        if "loss" in own[0]:
            loss, norm = (
                max(abs(a[k] - b[k]) / abs(b[k]) for a, b in zip(own, found, strict=True))
                for k in ("loss", "grad_norm")
            )
            same = f"loss {loss:.0e}, gradient {norm:.0e} apart"
        lines.append(
            [
                "",
                peer,
                rate_text(cell, statistics.median(run["rate"] for run in found)),
                spread,
                f"{aims[peer]:g}x" if peer in aims else "",
                f"{theirs:.2f} GB",
                f"{memory / theirs:.2f}",
                same,
            ]
        )
    return lines


def show(results: list[dict], peaks: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = ", ".join(f"{dtype} {peak / 1e9:.0f}" for dtype, peak in peaks.items())
    table = Table(title=f"medians; matrix peak in GFLOP/s: {shown}")
    for heading in ("", "", "rate", "dpoctl / peer (spread)", "aim", "peak memory", "of peer's", ""):
        table.add_column(heading)
    for cell in results:
        for line in rows_of(cell, peaks):
            table.add_row(*line)
        table.add_section()
    Console(width=190).print(table)


def draw(results: list[dict], path: Path) -> None:
    """Bars: how many times faster dpoctl is than each peer, on a log scale, with the spread over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = []
    for cell in results:
        for peer, found in cell["runs"].items():
            if peer != "dpoctl":
                ratios = [a["rate"] / b["rate"] for a, b in zip(cell["runs"]["dpoctl"], found, strict=True)]
                what = " ".join(filter(None, (cell["part"], cell["model"], cell["data"])))
                bars.append(
                    (f"{what} ({cell['dtype']})\nagainst {peer}", statistics.median(ratios), min(ratios), max(ratios))
                )
    bars.reverse()
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(bars) + 1.2), layout="constrained")
    names, gains = [b[0] for b in bars], [b[1] - 1 for b in bars]  # a bar begins where the two are equal
    errors = [[b[1] - b[2] for b in bars], [b[3] - b[1] for b in bars]]
    axes.barh(names, gains, left=1, xerr=errors, color="#4878a8", ecolor="#333333", capsize=2)
    for i, b in enumerate(bars):
        axes.text(b[3] * 1.03, i, f"{b[1]:.1f}x", va="center", fontsize=8)
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if t <= 1.3 * max(b[3] for b in bars)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(0.9, *(0.9 * b[2] for b in bars)), 1.3 * max(b[3] for b in bars))
    axes.set_xlabel("dpoctl's rate over the peer's")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, help="parts to run (default: all)")
    parser.add_argument("--model", nargs="*", choices=list(inputs.SHAPES), help="models to run (default: both)")
    parser.add_argument(
        "--data", nargs="*", choices=list(inputs.PAIRS), help="data of the training parts (default: both)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="alternations of all sides")
    args = parser.parse_args()
    asked = args.only
    if not VLLM.is_file():
        if args.only and "engines" in args.only:
            raise SystemExit("engines: no environment with vLLM; make test-vllm makes it")
        args.only = [part for part in args.only or PARTS if part != "engines"]
    inputs.make(inputs.FOLDER)
    peaks = matrix_peaks({})
    out = inputs.FOLDER.parent
    results = {}
    if (out / "bench.json").exists() and (asked or args.model or args.data):  # a part is added to what is known
        results = {name_of(cell): cell for cell in json.loads((out / "bench.json").read_text())["cells"]}
    for cell in cells(args.only or list(PARTS), args.model or list(inputs.SHAPES), args.data or list(inputs.PAIRS)):
        print(f"{time.strftime('%H:%M:%S')} {name_of(cell)}", file=sys.stderr)
        results[name_of(cell)] = compare(cell, args.rounds)
        peaks = matrix_peaks(peaks)
        (out / "bench.json").write_text(json.dumps({"peak_flops": peaks, "cells": list(results.values())}, indent=2))
    order = [name_of(cell) for cell in cells(list(PARTS), list(inputs.SHAPES), list(inputs.PAIRS))]
    results = sorted(results.values(), key=lambda cell: [name_of(cell) != name for name in order])
    show(results, peaks)
    draw(results, out / "bench.png")
    print(f"{out / 'bench.json'}, {out / 'bench.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
