"""The command line as a user runs it: subprocesses in a folder that holds small models and rows (the miniature
world)."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = "--max-length 96 --max-prompt-length 16 --warmup-steps 2".split()
COLD = [sys.executable, "-m", "dpoctl"]  # with the seconds that importing torch takes


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for a condition that running processes bring about; fail if one of them ends before, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "the process ended before the condition held"
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.005)


def lines_in(path: Path) -> int:
    """Complete lines of a file, 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


class World:
    """A folder with models and rows, and the command line in it.

    `run` forks the command from a process that has imported everything (`warm`); `popen` starts it as a user does.
    """

    def __init__(self, folder: Path, warm: list[str]):
        self.folder, self.warm = folder, warm
        self.env = os.environ | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # forked processes have one thread; other counts would give other bytes
        }

    def filled(self, made: "World") -> "World":
        """This world, with what another one has and it has not."""
        for source in made.folder.iterdir():
            target = self.folder / source.name
            if not target.exists():
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        return self

    def popen(self, *args: str, command: list[str] = COLD) -> subprocess.Popen:
        """Start a command line, given as words or as texts of several words."""
        return subprocess.Popen(
            [*command, *" ".join(args).split()],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr) of a command line whose exit code is `code`."""
        process = self.popen(*args, command=self.warm)
        out, err = process.communicate(timeout=180)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out, err

    def kill(self, *args: str, when: Callable[[], object], delay: float = 0) -> None:
        """Start a command and send it SIGKILL `delay` seconds after the condition holds."""
        process = self.popen(*args)
        wait_until(when, process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the command ended before the signal"

    def has_checkpoint(self, run: str) -> bool:
        return any((self.folder / run / "checkpoints").glob("step-*"))

    def manifest(self, output: str) -> dict:
        """The manifest of a run directory or of a row file."""
        path = self.folder / (f"{output}.manifest.json" if output.endswith(".jsonl") else f"{output}/manifest.json")
        return json.loads(path.read_text())

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def digest(self, *names: str) -> list[str]:
        return [hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in names]


def make_world(folder: Path) -> None:
    """A small language model, a classifier, reviews (training and held out) and prompts (training and test)."""
    from dpoctl.models.tokenizers import load_tokenizer
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
        *"--log-every 2 --save-every 3 --eval-every 4 --eval-prompts test.jsonl --scorer classifier".split(),
        *f"--max-new-tokens 12 --keep-samples --out {out}".split(),
        *more,
    ]


REWARD_MODEL = [*"train-rm --model sft --data prefs.jsonl --batch-size 16 --lr 1e-3 --epochs 2".split(), *TRAIN]


def ppo(out: str, *more: str, reward: str = "rm") -> list[str]:
    return [
        *f"train-ppo --model sft --prompts train.jsonl --reward {reward} --batch-size 12 --minibatch-size 6".split(),
        *"--ppo-epochs 2 --max-steps 6 --epochs 4 --lr 3e-4 --target-kl 1 --kl-horizon 60 --max-new-tokens 12".split(),
        *"--max-length 96 --max-prompt-length 16 --save-every 2 --generation-batch-size 4".split(),
        *f"--eval-prompts test.jsonl --scorer classifier --eval-every 3 --out {out}".split(),
        *more,
    ]


def assert_same_bytes(
    world: World, one: str, other: str, names: tuple[str, ...] = ("model.safetensors", "metrics.jsonl")
) -> None:
    """Two runs have the same weights and metrics byte for byte."""
    assert world.digest(*(f"{one}/{name}" for name in names)) == world.digest(*(f"{other}/{name}" for name in names))


def assert_same_run(world: World, one: str, other: str) -> None:
    """Weights, metrics and samples byte for byte; evaluations too, except for the run's name in them."""
    assert_same_bytes(world, one, other, ("model.safetensors", "metrics.jsonl", "samples.jsonl"))
    points = [
        (world.folder / name / "eval.jsonl").read_text().replace(f'"model": "{name}"', "") for name in (one, other)
    ]
    assert points[0] == points[1]
