"""dpoctl's side of the benchmark: its own commands, or the very functions they call. Prints one JSON line."""

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path


def train(command: str, model: Path, data: Path, pairs: int, steps: int, dtype: str) -> dict:
    """Pairs per second of the updates after the first, the first one's loss and gradient norm."""
    from dpoctl.__main__ import main

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        common = ["--data", str(data), "--batch-size", str(pairs), "--epochs", "1000", "--max-steps", str(steps),
                  "--log-every", "1", "--warmup-steps", "0", "--lr", "1e-6", "--optimizer", "adamw", "--dtype", dtype,
                  "--max-length", "512", "--max-prompt-length", "360", "--keep-checkpoints", "0", "-q", "--out", str(out)]  # fmt: skip
        if command == "train-dpo":
            own = [
                "--model",
                str(model / "policy"),
                "--ref",
                str(model / "reference"),
                "--cache-dir",
                f"{folder}/cache",
            ]
        else:
            own = [
                "--model",
                str(model / "reward"),
                "--eval-data",
                str(data.with_name("held-out.jsonl")),
                "--select",
                "last",
            ]
        sys.argv = ["dpoctl", command, *own, *common]
        try:
            main()
        except SystemExit as e:
            assert not e.code, e
        timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return {"rate": statistics.median(row["pairs_per_s"] for row in timing[1:]), "loss": first["loss"],
            "grad_norm": first["grad_norm"]}  # fmt: skip


def sample(model: Path, rows: int, tokens: int, dtype: str) -> dict:
    """Tokens per second of `rows` completions, one of each prompt, as dpoctl sample draws them."""
    import torch

    from dpoctl.models.generate import Sampling, generate
    from dpoctl.models.load import load_policy
    from dpoctl.training import runtime

    policy, tokenizer = load_policy(str(model / "policy"))
    runtime.pick_device("cpu")
    prompts = sample_prompts(rows)
    sampling = Sampling(max_new_tokens=tokens)
    times = []
    for seed in range(4):
        start = time.perf_counter()
        with runtime.autocast(torch.device("cpu"), runtime.pick_dtype(dtype, torch.device("cpu"))):
            drawn = generate(policy, tokenizer, prompts, [str(i) for i in range(rows)], [0], sampling, seed)
        times.append(sum(len(c.ids) for [c] in drawn) / (time.perf_counter() - start))
    return {"rate": statistics.median(times[1:])}


def sample_prompts(rows: int) -> list[list[int]]:
    return [[2 + (7 * i + j) % 4000 for j in range(2 + i % 7)] for i in range(rows)]


if __name__ == "__main__":
    what, arguments = sys.argv[1], json.loads(sys.argv[2])
    for name in ("model", "data"):
        if name in arguments:
            arguments[name] = Path(arguments[name])
    result = sample(**arguments) if what == "sample" else train(what, **arguments)
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("RESULT " + json.dumps(result))
