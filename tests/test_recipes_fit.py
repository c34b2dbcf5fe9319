"""Every command of every recipe at its full size, through --dry-run: on one GPU of 80 GB, or on eight of them.

Models are configurations with the public numbers (`helpers/real_models.py`), rows are as long as the recipe lets them
be. Commands that differ by what memory does not depend on are planned once.
"""

import json
import re
import shlex
import subprocess

import pytest

from dpoctl.cli import init
from dpoctl.cli.app import run
from helpers import real_models

SIEBERT = "siebert/sentiment-roberta-large-english"
# recipe: (devices, models by the name that the recipe gives them, (tokens of a prompt, of a completion, completions))
RECIPES = {
    "imdb": (1, {"gpt2-large": "gpt2-large", SIEBERT: "sentiment-roberta-large"}, (8, 64, 4)),
    "tldr": (8, {"CarperAI/openai_summarize_tldr_sft": "gpt-j-6b", "EleutherAI/gpt-j-6b": "gpt-j-6b"}, (560, 80, 2)),
    "hh": (8, {"EleutherAI/pythia-2.8b": "pythia-2.8b"}, (256, 256, 2)),
    "cnn-dm": (1, {}, (1984, 64, 2)),
    "own-preferences": (1, {"HuggingFaceTB/SmolLM2-135M": "smollm2-135m"}, (256, 256, 2)),
}
TRAINED = {"imdb": "gpt2-large", "tldr": "gpt-j-6b", "hh": "pythia-2.8b", "cnn-dm": "gpt-j-6b"}
TARGET = {"imdb": "frontier"}
VARIES = re.compile(r"--(beta|alpha|target-kl|seed|out) \S+ ?")
NO_MODEL = ("prepare", "report", "merge")


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    RECIPES,
)
def test_every_command_fits(recipe, tmp_path, monkeypatch, capsys):
    devices, models, sizes = RECIPES[recipe]
    folder = tmp_path / recipe
    init.copy(recipe, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = {}
    for command in commands(recipe, folder):
        words = shlex.split(command)
        name, paths = words[0], {path for path in words if path.startswith(("runs/", "../"))}
        for path in paths:
            write_input(recipe, folder / path, sizes)
        for hub_name, config in models.items():
            if hub_name in words:
                place = folder / "models" / config
                real_models.write(place, config)
                words = [str(place) if word == hub_name else word for word in words]
        plan = ["--dry-run", "--plan-device", "h100"]
        if name in ("sft", "train-dpo", "train-rm", "train-ppo", "train-ilql"):
            plan += ["--plan-world-size", str(devices)]
        elif name == "judge":
            plan = ["--dry-run"]
        assert run([*words, *plan, "-q"]) == 0, (command, capsys.readouterr().err)
        told[command] = capsys.readouterr().out
    planned = {command: out for command, out in told.items() if not command.startswith(("judge",))}
    assert planned
    for command, out in planned.items():
        print(command, "\n", out)
        assert re.search(r"^device .*: it fits$", out, re.MULTILINE), f"{command}\n{out}"


def commands(recipe: str, folder) -> list[str]:
    """The command lines of the recipe's largest target that run a model, each kind once."""
    args = ["make", "-n", TARGET.get(recipe, "all"), "DPOCTL=dpoctl", "W=runs"]
    done = subprocess.run(args, cwd=folder, capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("dpoctl ") and line.split()[1] not in NO_MODEL:
            command = line.removeprefix("dpoctl ").strip()
            kind = re.sub(r"runs/(dpo|ppo|sft|preferred-ft|unlikelihood)\S*(?= |$)", "POLICY", VARIES.sub("", command))
            found.setdefault(kind, command)
    return list(found.values())


def write_input(recipe: str, path, sizes: tuple[int, int, int]) -> None:
    """The file or model directory that an earlier command of the recipe would have written."""
    prompt, answer, count = sizes
    if path.exists():
        return
    if path.suffix != ".jsonl":
        kind = "reward" if path.name == "rm" else "policy"
        real_models.write(path, TRAINED.get(recipe, "smollm2-135m"), kind)
        if path.name == "ilql":
            (path / "ilql.safetensors").touch()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [real_models.text(prompt, i) for i in range(256)]
    answers = [" " + real_models.text(answer, 1000 + i) for i in range(count)]
    if path.name.startswith("prompts"):
        rows = [{"prompt_id": str(i), "prompt": text, "reference": answers[0]} for i, text in enumerate(texts)]
    elif path.name.startswith(("prefs", "round-", "sft.part-")):
        pairs = [(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
        scores = {"chosen_score": 0.9, "rejected_score": 0.1}
        rows = [{"prompt": text, "chosen": a, "rejected": b} | scores for text in texts[:64] for a, b in pairs]
    elif path.name == "sft.jsonl":
        rows = [{"text": real_models.text(600, i)} for i in range(64)]
    elif path.name == "shots.jsonl":
        rows = [{"prompt": text, "completion": answers[0]} for text in texts[:2]]
    elif path.name == "ilql.scored.jsonl":
        scored = [(text, answer, i / 256) for i, text in enumerate(texts) for answer in answers]
        rows = [{"prompt": text, "completion": answer, "score": score} for text, answer, score in scored]
    else:
        rows = [{"prompt": text, "completion": answers[0], "reference": answers[0]} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
