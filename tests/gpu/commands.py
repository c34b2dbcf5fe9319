"""The commands on models of real shapes with random weights: tokens per second, share of the peak, peak memory."""

import gc
import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer

from dpoctl.cli.app import run
from dpoctl.inference.engines import local
from dpoctl.models import place
from dpoctl.models.pretrained import Source
from gpu import models

# Peak of bfloat16 matrix products by device name, in FLOP/s, without sparsity (the makers' data sheets).
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
_UNITS = {"GB": 1.0, "MB": 1e-3}


def prepare(folder: Path, name: str, tokenizer_of: Path, rows: int, words: int) -> None:
    """A model of `models.REAL` without weights, and preferences and prompts of so many words."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    models.write(folder / name, name, tokenizer)
    draw = random.Random(0)
    known = [w for w in (tokenizer.decode([i]).strip() for i in range(300, 900)) if w.isalpha()]

    def text() -> str:
        return " ".join(draw.choice(known) for _ in range(words))

    pairs = [{"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"} for _ in range(rows)]
    prompts = [{"prompt_id": str(i), "prompt": pair["prompt"]} for i, pair in enumerate(pairs)]
    for file, found in (("pairs.jsonl", pairs), ("prompts.jsonl", prompts)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in found))


def train(folder: Path, name: str, device: torch.device, *options: str) -> dict[str, Any]:
    """train-dpo: the rate of its last updates, MFU, and its peak beside what --dry-run says."""
    out = folder / "run"
    words = ["train-dpo", "--model", str(folder / name), "--data", str(folder / "pairs.jsonl"), "--out", str(out)]
    words += ["--device", device.type, "--cache-dir", str(folder / "cache"), "--overwrite", *options]
    with redirect_stdout(io.StringIO()) as plan:
        _succeed([*words, "--dry-run"])
    _free(device)
    if "--quantize" in options:  # which is done while weights are read
        _write_weights(folder / name)
        _succeed(words)
    else:
        with mock.patch.object(place, "load_complete", models.random_weights):
            _succeed(words)
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    cost = json.loads((out / "manifest.json").read_text())["cost"]
    parts = {key: float(n) * _UNITS[unit] for key, n, unit in _SIZE.findall(plan.getvalue())}
    row = {
        "tokens_per_s": timing[-1]["tokens_per_s"],
        "pairs_per_s": timing[-1]["pairs_per_s"],
        "peak_gb": max(line["peak_memory_gb"] for line in timing),
        "planned_gb": parts["memory of a device"],
        "mfu": timing[-1].get("mfu", _mfu(cost, timing[-1]["tokens_per_s"], adapters="--lora" in options)),
    }
    shutil.rmtree(out)
    _free(device)
    return row


_SIZE = re.compile(r"(?m)^(memory.*?) {2,}(\S+) (GB|MB)(?: \(.*\))?$")


def _mfu(cost: dict[str, Any], rate: float, *, adapters: bool) -> float | None:
    """Share of the device's peak; frozen weights have no gradients, which are a third of the FLOPs."""
    peak = next((peak for name, peak in PEAKS.items() if name in cost["device"]), None)
    flops_per_token = cost["flops"] / cost["tokens"] * (2 / 3 if adapters else 1)
    return peak and rate * flops_per_token / peak


def sample(folder: Path, name: str, device: torch.device, rows: int, tokens: int) -> dict[str, Any]:
    """sample: the rate of its second batch of `rows` completions, and its peak."""
    out = folder / "samples.jsonl"
    words = ["sample", "--model", str(folder / name), "--prompts", str(folder / "prompts.jsonl"), "--out", str(out)]
    words += ["--device", device.type, "--generation-batch-size", str(rows), "--max-new-tokens", str(tokens)]
    words += ["--limit", str(2 * rows), "--overwrite"]
    _free(device)
    with mock.patch.object(place, "load_complete", models.random_weights), timed(device) as rates:
        _succeed(words)
    assert len(rates) == 2
    row = {"tokens_per_s": rates[1], "peak_gb": json.loads(Path(f"{out}.manifest.json").read_text())["cost"]}
    row["peak_gb"] = row["peak_gb"]["peak_memory_bytes"] / 1e9
    _free(device)
    return row


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Tokens per second of each batch that the sampler generates meanwhile."""
    rates: list[float] = []
    own = local.generate

    def generate(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = own(*args, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(sum(len(c.ids) for each in found for c in each) / (time.perf_counter() - start))
        return found

    with mock.patch.object(local, "generate", generate):
        yield rates


def ranks(folder: Path, name: str, device: torch.device, count: int) -> dict[str, Any]:
    """The largest difference, over three updates, of the losses of `count` ranks with fsdp and of one process."""
    weights = folder / "whole"
    model = _with_weights(folder / name)
    model.save_pretrained(weights)
    AutoTokenizer.from_pretrained(folder / name).save_pretrained(weights)
    del model
    words = ["train-dpo", "--model", str(weights), "--data", str(folder / "pairs.jsonl"), "--device", device.type]
    words += "--max-steps 3 --log-every 1 --warmup-steps 0 --batch-size 8 --lr 1e-5 --tokens-per-batch 2048".split()
    words += ["--dtype", "float32", "--cache-dir", str(folder / "cache"), "--overwrite"]
    losses = []
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    for command, more in (([sys.executable], []), (start, ["--parallel", "fsdp"])):
        out = folder / f"run-{len(losses)}"
        subprocess.run([*command, "-m", "dpoctl", *words, "--out", str(out), *more], check=True, capture_output=True)
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    return {"losses off": max(abs(a - b) for a, b in zip(*losses, strict=True))}


def _with_weights(folder: Path) -> Any:
    return models.random_weights(models.hf.AutoModelForCausalLM, Source("", str(folder)), torch.float32)


def _write_weights(folder: Path) -> None:
    """In bfloat16, in which large models are published."""
    model = models.random_weights(models.hf.AutoModelForCausalLM, Source("", str(folder)), torch.bfloat16)
    model.save_pretrained(folder)


def trl(folder: Path, name: str, device: torch.device, pairs: int, each: int) -> dict[str, Any]:
    """TRL's DPO on the same pairs, with reference log-probs computed beforehand."""
    from bench import peers

    weights = folder / "trl"
    model = _with_weights(folder / name)
    for role in ("policy", "reference"):
        model.save_pretrained(weights / role)
        AutoTokenizer.from_pretrained(folder / name).save_pretrained(weights / role)
    del model
    data = str(folder / "pairs.jsonl")
    found = peers.train("train-dpo", str(weights), data, pairs, each, 6, True, "bfloat16", device=device.type)
    shutil.rmtree(weights)
    return {"pairs_per_s": found["rate"], "loss": found["loss"]}


def _succeed(words: list[str]) -> None:
    assert run(words) == 0, " ".join(words)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
