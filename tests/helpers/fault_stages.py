"""The stages that faults are injected into, each a command of a second or two in the miniature world.

A command runs two folders below the world, where its inputs are; its outputs are beside it.
"""

import functools
from pathlib import Path

from helpers.generation_server import GenerationServer

UP = "../.."
LENGTHS = ["--max-length", "64", "--max-prompt-length", "16", "--warmup-steps", "2"]
TRAINING = ["--batch-size", "4", "--lr", "1e-3", "--save-every", "2", "--log-every", "2", *LENGTHS]
POINTS = f"--eval-prompts {UP}/few.jsonl --scorer {UP}/classifier --max-new-tokens 6 --eval-every 3".split()
SAMPLING = ["--prompts", f"{UP}/few.jsonl", "--max-new-tokens", "6", "--generation-batch-size", "4"]

STAGES: dict[str, list[str]] = {
    "prepare": (
        f"prepare imdb --source {UP}/reviews.jsonl --tokenizer {UP}/lm --train-prompts 20 --test-prompts 8 --out data"
    ).split(),
    "sft": [
        *f"sft --model {UP}/lm --data {UP}/some.jsonl --eval-data {UP}/some.jsonl".split(),
        *TRAINING,
        *POINTS,
        *"--max-steps 5 --out sft".split(),
    ],
    "make-prefs": [
        "make-prefs",
        "--model",
        f"{UP}/sft",
        *SAMPLING,
        *f"--scorer {UP}/classifier --completions 3 --completions-out samples.jsonl --out prefs.jsonl".split(),
    ],
    # an engine that ends before the scorer is loaded: the samples are kept beside the output
    "make-prefs-kept": (
        f"make-prefs --model {UP}/sft --prompts {UP}/few.jsonl --max-new-tokens 6 --engine vllm --engine-batch-size 6 "
        f"--scorer {UP}/classifier --completions 3 --completions-out samples.jsonl --out prefs.jsonl"
    ).split(),
    "prefs-given": (
        f"make-prefs --samples {UP}/samples.jsonl --samples {UP}/other.jsonl --scorer {UP}/classifier "
        "--completions-out scored.jsonl --out prefs.jsonl"
    ).split(),
    "prefs-judge": [
        "make-prefs",
        "--model",
        f"{UP}/sft",
        *SAMPLING,
        *f"--completions 3 --judge scorer --scorer {UP}/classifier --out prefs.jsonl".split(),
    ],
    "prefs-votes": (
        f"make-prefs --judgements {UP}/within.jsonl --samples {UP}/samples.jsonl --pairs random --out prefs.jsonl"
    ).split(),
    "prefs-unpaired": (
        f"make-prefs --samples {UP}/samples.jsonl --samples {UP}/other.jsonl --scorer {UP}/classifier --unpaired "
        "--out rated.jsonl"
    ).split(),
    "train-dpo": [
        *f"train-dpo --model {UP}/sft --data {UP}/prefs.jsonl".split(),
        *TRAINING,
        *POINTS,
        *"--keep-samples --max-steps 5 --out dpo".split(),
    ],
    "dpo-unpaired": [  # with means over all updates, which a checkpoint holds
        *f"train-dpo --model {UP}/sft --data {UP}/rated.jsonl --eval-data {UP}/rated.jsonl --loss bco".split(),
        *TRAINING,
        *"--eval-every 3 --max-steps 5 --out unpaired".split(),
    ],
    "dpo-votes": [
        *f"train-dpo --model {UP}/sft --data {UP}/voted.jsonl --soft-labels votes --label-smoothing 0.1".split(),
        *TRAINING,
        *"--max-steps 5 --out voted".split(),
    ],
    "train-rm": [
        *f"train-rm --model {UP}/sft --data {UP}/prefs.jsonl".split(),
        *TRAINING,
        *"--eval-every 1 --max-steps 5 --validation 0.3 --out rm".split(),
    ],
    "train-ppo": [
        *f"train-ppo --model {UP}/sft --prompts {UP}/few.jsonl --reward {UP}/rm".split(),
        *TRAINING,
        *POINTS,
        *(
            "--minibatch-size 2 --ppo-epochs 2 --max-steps 4 --epochs 4 --target-kl 1 "
            "--kl-horizon 60 --normalize-rewards --out ppo"
        ).split(),
    ],
    "train-ilql": [
        *f"train-ilql --model {UP}/sft --data {UP}/prefs.jsonl --rows preferences".split(),
        *TRAINING,
        *f"--eval-data {UP}/prefs.jsonl --eval-every 3 --target-every 2 --max-steps 5 --out ilql".split(),
    ],
    "sample": [
        "sample",
        "--model",
        f"{UP}/sft",
        *SAMPLING,
        *"--n 2 --temperature 0.7,1 --out samples.jsonl".split(),
    ],
    "sample-server": [
        *f"sample --model {UP}/sft --prompts {UP}/few.jsonl --max-new-tokens 6 --n 2 --engine server".split(),
        *"--base-url http://in-process/v1 --engine-batch-size 4 --concurrency 3 --out served.jsonl".split(),
    ],
    "score": ["score", "--data", f"{UP}/samples.jsonl", "--scorer", f"{UP}/rm", "--out", "scored.jsonl"],
    "judge": (
        f"judge {UP}/samples.jsonl {UP}/other.jsonl --backend scorer --scorer {UP}/classifier --out judged.jsonl"
    ).split(),
    "evaluate": [
        *f"evaluate --model {UP}/sft --model {UP}/dpo --ref {UP}/sft".split(),
        *SAMPLING,
        *f"--scorer {UP}/classifier --out evaluations.jsonl".split(),
    ],
    "report": ["report", f"{UP}/evaluations.jsonl", f"{UP}/samples.jsonl", f"{UP}/judged.jsonl", "--out", "report"],
}


def small_batches() -> None:
    """Batches of a few rows also where a stage fixes their size, so that a fault falls between two of them.

    In place of vLLM the local sampler generates, with the same order of work.
    """
    from dpoctl.inference import sources
    from dpoctl.stages import judge, score

    from .engines import use_ahead

    judge._BATCH = score._BATCH = sources.BATCH = 3
    use_ahead(setattr)
    serve_in_process()


@functools.cache
def server() -> GenerationServer:
    """A server in this process, started with the first request to it."""
    found = GenerationServer(f"{UP}/sft")
    found.start()
    return found


def serve_in_process() -> None:
    """Lead requests to the host `in-process` to this process's own server, whatever its port is."""
    from dpoctl.runtime.http import Http

    connect = Http._connect

    def to_server(http):
        if http.host == "in-process":
            http.host, http.port = "127.0.0.1", server().port
        return connect(http)

    Http._connect = to_server


def build(lab, tiny_world: Path) -> None:
    """The inputs of every stage, from a folder that holds lm, classifier and rows, by undisturbed runs of the chain."""
    world = lab.world
    for name in ("lm", "classifier"):
        (world / name).symlink_to(tiny_world / name)
    for name, source, count in (("reviews", "sft", 60), ("some", "held", 10), ("few", "test", 6)):
        lines = (tiny_world / f"{source}.jsonl").read_text().splitlines()[:count]
        (world / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    other = ["--seed", "1", *STAGES["sample"][1:-1], "other.jsonl"]
    within = f"judge --within {UP}/samples.jsonl --backend scorer --scorer {UP}/classifier --out within.jsonl".split()
    voted = f"make-prefs --judgements {UP}/within.jsonl --samples {UP}/samples.jsonl --out voted.jsonl".split()
    chain = ["sft", "make-prefs", "train-dpo", "train-rm", "sample", ["sample", *other], "judge", within, "evaluate"]
    chain += ["prefs-unpaired", voted]
    for stage in chain:
        argv = STAGES[stage] if isinstance(stage, str) else stage
        folder = lab.folder()
        outcome = lab.run(folder, argv, None, small_batches)
        assert outcome.code == 0, outcome.said
        for made in folder.iterdir():
            if made.name not in ("said", "cache"):
                made.rename(world / made.name)
