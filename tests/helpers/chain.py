"""The command line as a user runs it, in subprocesses, within a folder that holds a miniature world."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = ["--max-length", "96", "--max-prompt-length", "16", "--warmup-steps", "2"]


COLD = [sys.executable, "-m", "dpoctl"]


class World:
    """A folder with models and rows, and the command line in it: `warm`, forked from a process that has imported
    everything, or started as a user starts it."""

    def __init__(self, folder: Path, warm: list[str]):
        self.folder, self.warm = folder, warm
        self.env = os.environ | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # as many as a forked process has: the same bytes
        }

    def popen(self, *args: str, command: list[str] = COLD) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *map(str, args)],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, code: int = 0) -> tuple[str, str]:
        process = self.popen(*args, command=self.warm)
        out, err = process.communicate(timeout=180)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out, err

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def digest(self, *names: str) -> list[str]:
        return [hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in names]


def make_world(folder: Path) -> None:
    """A small language model, a classifier, and rows: reviews to train on and held out, prompts to train and to test."""
    from dpoctl.models.load import load_tokenizer
    from dpoctl.tasks import imdb, toy_models, toy_text

    reviews = [{"id": f"r{i}"} | r for i, r in enumerate(toy_text.reviews(400, 0))]
    toy_models.build_base_lm([r["text"] for r in reviews], folder / "lm", 0, steps=40, batch=16)
    toy_models.build_classifier(reviews, folder / "classifier", 0, steps=20, batch=16)
    prompts = imdb.prefix_prompts(reviews, load_tokenizer(str(folder / "lm")), 0)
    sft, train, test = imdb.split_prompts(reviews, prompts, 24, 12, 0)
    for name, rows in (("sft", sft[:96]), ("held", sft[96:120]), ("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def dpo(out: str, *more: str) -> list[str]:
    return [
        *"train-dpo --model sft --data prefs.jsonl --eval-data prefs.jsonl --batch-size 16 --lr 1e-4".split(),
        *TRAIN,
        *(
            "--log-every 2 --save-every 3 --eval-every 4 --eval-prompts test.jsonl "
            "--scorer classifier --max-new-tokens 12 --keep-samples --out"
        ).split(),
        out,
        *more,
    ]


def same_run(world: World, one: str, other: str) -> None:
    """Weights and metrics byte for byte; evaluations too, but for the run's own name in them."""
    kept = ("model.safetensors", "metrics.jsonl", "samples.jsonl")
    assert world.digest(*(f"{one}/{k}" for k in kept)) == world.digest(*(f"{other}/{k}" for k in kept))
    points = [
        (world.folder / name / "eval.jsonl").read_text().replace(f'"model": "{name}"', "") for name in (one, other)
    ]
    assert points[0] == points[1]
