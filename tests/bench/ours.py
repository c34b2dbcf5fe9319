"""dpoctl's side of the benchmark: its own commands, or the very functions they call. Prints one JSON line."""

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(command: str, model: Path, data: Path, pairs: int, steps: int, dtype: str) -> dict:
    """Pairs per second of the updates after the first, the first one's loss and gradient norm."""
    own = {
        "train-dpo": ["--model", model / "policy", "--ref", model / "reference"],
        "train-rm": [
            "--model",
            model / "reward",
            "--eval-data",
            model / "held-out.jsonl",
            "--select",
            "last",
            "--eval-every",
            1000,
        ],
    }[command]
    timing, first = _run(
        command,
        [
            *own,
            "--data",
            data,
            "--batch-size",
            pairs,
            "--epochs",
            1000,
            "--max-length",
            512,
            "--max-prompt-length",
            360,
        ],
        steps,
        dtype,
    )
    rate = statistics.median(row["pairs_per_s"] for row in timing[1:])
    needed = operations_of_pairs(model, data, pairs, command)
    return {"rate": rate, "loss": first["loss"], "grad_norm": first["grad_norm"], "flops": rate * needed}


def ppo(model: Path, episodes: int, tokens: int, dtype: str) -> dict:
    """Updates per second: one update of `episodes` rollouts, 4 passes, a value model of its own."""
    options = [
        "--model",
        model / "policy",
        "--ref",
        model / "reference",
        "--reward",
        model / "reward",
        "--prompts",
        model / "prompts.jsonl",
        "--batch-size",
        episodes,
        "--minibatch-size",
        episodes,
        "--max-new-tokens",
        tokens,
        "--epochs",
        1000,
    ]
    timing, _ = _run("train-ppo", options, 1, dtype)
    trunk, head = weights(model)
    prompts = sum(len(json.loads(line)["prompt"].split()) for line in open(model / "prompts.jsonl"))
    responses = episodes * tokens
    # forward passes: generating, old log-probs, the reference's, values, reward;
    # forward and backward: 4 passes of two models
    forward = 2.0 * (5 * trunk * (prompts + responses) + 3 * head * responses)
    learning = 4 * 6.0 * (2 * trunk * (prompts + responses) + head * responses)
    rate = 1 / timing[0]["seconds"]
    parts = {name: seconds for name, seconds in timing[0].items() if name.startswith("seconds/")}
    return {"rate": rate, "flops": rate * (forward + learning), "parts": parts}


def _run(command: str, options: list, steps: int, dtype: str) -> tuple[list[dict], dict]:
    """(rows of timing.jsonl, first row of metrics.jsonl) of a training command."""
    from dpoctl.__main__ import main

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        common = [
            "--max-steps",
            steps,
            "--log-every",
            1,
            "--warmup-steps",
            0,
            "--lr",
            1e-6,
            "--optimizer",
            "adamw",
            "--dtype",
            dtype,
            "--keep-checkpoints",
            0,
            "-q",
            "--out",
            out,
        ]
        if command == "train-dpo":
            common += ["--cache-dir", f"{folder}/cache"]
        sys.argv = ["dpoctl", command, *map(str, [*options, *common])]
        try:
            main()
        except SystemExit as e:
            assert not e.code, e
        rows = {
            name: [json.loads(line) for line in (out / name).read_text().splitlines()]
            for name in ("timing.jsonl", "metrics.jsonl")
        }
    return rows["timing.jsonl"], rows["metrics.jsonl"][0]


def weights(model: Path) -> tuple[int, int]:
    """Weights of the products that every token takes part in, and of the head's."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model / "policy")
    return 12 * config.n_layer * config.n_embd**2, config.n_embd * config.vocab_size


def operations_of_pairs(model: Path, data: Path, pairs: int, command: str) -> float:
    """Operations that an update needs at least, a pair: 6 a trunk's weight and token, for DPO 6 a head's weight and
    row.

    A token of a prompt counts once for all completions, a completion once for all pairs; rows are the response tokens.
    """
    trunk, head = weights(model)
    prompts, completions = set(), set()
    for line in data.read_text().splitlines()[:pairs]:
        row = json.loads(line)
        prompts.add(row["prompt"])
        completions |= {(row["prompt"], row[side]) for side in ("chosen", "rejected")}
    rows = sum(len(text.split()) + 1 for _, text in completions)  # and an EOS, which is predicted but not forwarded
    tokens = sum(len(p.split()) for p in prompts) + rows
    if command == "train-rm":
        return 6.0 * trunk * tokens / pairs
    return 6.0 * (trunk * (tokens - len(completions)) + head * rows) / pairs


def sample(model: Path, rows: int, tokens: int, dtype: str) -> dict:
    """Tokens per second of `rows` completions, one of each prompt, as dpoctl sample draws them."""
    from dpoctl.inference.engines.local import LocalEngine
    from dpoctl.inference.generate import batch_slices
    from dpoctl.models.load import load_policy
    from dpoctl.models.place import Place
    from dpoctl.runtime import devices

    compute = devices.open_compute("cpu", dtype)
    engine = LocalEngine(load_policy(str(model / "policy"), Place(compute.device, compute.dtype)), compute)
    return sampling_rate(engine, model, rows, tokens, batch_slices(rows, 1))


def vllm(model: Path, rows: int, tokens: int, dtype: str) -> dict:
    """`sample` with vLLM as the engine, once it has started."""
    import os

    from dpoctl.config.resolve import resolve
    from dpoctl.config.sampling import Sample
    from dpoctl.inference.engines.vllm_engine import VllmEngine
    from dpoctl.inference.generate import Sampling
    from dpoctl.models.load import context_without_weights
    from dpoctl.models.tokenizers import load_codec

    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    path = str(model / "policy")
    given = {"model": path, "prompts": "p", "out": "o.jsonl", "engine": "vllm", "dtype": dtype}
    options, context = resolve(Sample, "sample", given, None), context_without_weights(path)
    with VllmEngine(options, path, load_codec(path), context) as engine:
        engine.complete(prompts_of(2, engine.codec), [0], Sampling(max_new_tokens=tokens))  # the first call starts it
        return sampling_rate(engine, model, rows, tokens, [slice(None)])


def sampling_rate(engine: Any, model: Path, rows: int, tokens: int, batches: list[slice]) -> dict:
    """The median rate of an engine over three draws, after one that warms up, and what it took."""
    from dpoctl.inference.generate import Sampling

    prompts, times = prompts_of(rows, engine.codec), []
    for seed in range(4):
        sampling = Sampling(max_new_tokens=tokens, seed=seed)
        start = time.perf_counter()
        drawn = [c for batch in batches for [c] in engine.complete(prompts[batch], [0], sampling)]
        times.append(sum(len(c.ids) - (c.finish == "stop") for c in drawn) / (time.perf_counter() - start))
    rate = statistics.median(times[1:])
    trunk, head = weights(model)
    read = sum(len(prompt.ids) for prompt in prompts)
    return {"rate": rate, "flops": rate * 2.0 * (trunk * (read / (rows * tokens) + 1) + head)}


def prompts_of(rows: int, codec: Any) -> list[Any]:
    from dpoctl.data.chats import Prompt
    from dpoctl.inference.generate import PromptTokens

    stops = codec.stops_of(Prompt(""))
    return [PromptTokens(str(i), ids, stops) for i, ids in enumerate(sample_prompts(rows))]


def sample_prompts(rows: int) -> list[list[int]]:
    return [[2 + (7 * i + j) % 4000 for j in range(2 + i % 7)] for i in range(rows)]


if __name__ == "__main__":
    what, arguments = sys.argv[1], json.loads(sys.argv[2])
    paths = {name: Path(arguments.pop(name)) for name in ("model", "data") if name in arguments}
    if what in ("sample", "train-ppo", "vllm"):
        result = {"sample": sample, "train-ppo": ppo, "vllm": vllm}[what](**paths, **arguments)
    else:
        result = train(what, **paths, **arguments)
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("RESULT " + json.dumps(result))
