"""The experiments of one family through the command line, each command when it is first needed."""

import json
from pathlib import Path
from typing import Any

from dpoctl.cli.app import run as command_line
from families import zoo

BETA = 0.3
SCORER = """import zlib


def noise(rows):
    return [zlib.crc32(row["completion"].encode()) / 2**32 for row in rows]
"""
_TRAIN = "--batch-size 256 --warmup-steps 0 --log-every 1 --optimizer adamw"
_SAMPLE = "--max-new-tokens 12 --seed 3"
COMMANDS = {  # output -> (what it needs, the command)
    "sft": ((), f"sft --model base --data sft.jsonl --max-steps 1 --lr 1e-3 {_TRAIN}"),
    "prefs.jsonl": (
        ("sft",),
        f"make-prefs --model sft --prompts prompts.jsonl --scorer python:noise.py:noise {_SAMPLE} "
        "--completions 4 --completions-out completions.jsonl",
    ),
    "dpo": (
        ("prefs.jsonl",),
        f"train-dpo --model sft --ref base --data prefs.jsonl --beta {BETA} --max-steps 1 --lr 1e-3 {_TRAIN}",
    ),
    **{
        name: (
            ("prefs.jsonl",),
            f"train-dpo --model sft --ref base --data {name}.jsonl --beta {BETA} --max-steps 1 --lr 1e-3 {_TRAIN}",
        )
        for name in ("flipped", "by-hand")
    },
    "rm": (
        ("prefs.jsonl",),
        "train-rm --model sft --data prefs.jsonl --max-steps 3 --lr 2e-3 --select last --normalize shift-scale "
        f"--validation 0.2 {_TRAIN}",
    ),
    "samples.jsonl": (("dpo",), f"sample --model dpo --prompts prompts.jsonl --n 2 {_SAMPLE}"),
    "a.jsonl": (("dpo",), f"sample --model dpo --prompts prompts.jsonl --n 1 {_SAMPLE}"),
    "b.jsonl": ((), f"sample --model base --prompts prompts.jsonl --n 1 {_SAMPLE}"),
    "greedy.jsonl": (("dpo",), "sample --model dpo --prompts prompts.jsonl --temperature 0 --max-new-tokens 12"),
    "scores.jsonl": (("rm",), "score --data completions.jsonl --scorer rm"),
    "implicit.jsonl": (("dpo",), "score --data completions.jsonl --scorer implicit:dpo,base"),
    "shapes-scored.jsonl": (("rm",), "score --data shapes.jsonl --scorer rm"),
    "eval.jsonl": (
        ("dpo", "rm"),
        f"evaluate --model dpo --ref base --prompts prompts.jsonl --n 2 --scorer rm {_SAMPLE}",
    ),
    "ppo": (
        ("dpo", "rm"),
        "train-ppo --model dpo --ref base --prompts prompts.jsonl --reward rm --batch-size 7 --minibatch-size 7 "
        f"--ppo-epochs 1 --max-steps 1 --lr 1e-4 --log-every 1 --max-length 200 --max-prompt-length 180 {_SAMPLE}",
    ),
    "judged.jsonl": (
        ("a.jsonl", "b.jsonl", "rm"),
        "judge a.jsonl b.jsonl --backend scorer --scorer rm --criterion helpful --order both",
    ),
}


class Chain:
    """A folder with a family's checkpoint, rows, and what the commands have made of them."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.tokenizer = name, folder, zoo.tokenizer_of(name)
        self.is_chat = name in zoo.CHATS
        zoo.save(name, folder / "base", seed=1)
        (folder / "noise.py").write_text(SCORER)
        self.write("prompts.jsonl", [{"prompt_id": f"p{i}", "prompt": p} for i, p in enumerate(prompts(name))])
        self.write("sft.jsonl", sft_rows(name))

    def make(self, output: str) -> Path:
        """An output, made on the first call, like what it needs."""
        path = self.folder / output
        if not path.exists():
            needs, command = COMMANDS[output]
            for need in needs:
                self.make(need)
            self.run(f"{command} --out {output}")
        return path

    def run(self, command: str, code: int = 0) -> None:
        """Run a command line in the folder, which is the working directory; any other error fails the test."""
        assert command_line(command.split()) == code, command

    def rows(self, output: str) -> list[dict]:
        """The rows of a file."""
        return [json.loads(line) for line in (self.folder / output).read_text(encoding="utf-8").splitlines()]

    def made(self, output: str) -> list[dict]:
        """The rows of an output."""
        self.make(output)
        return self.rows(output)

    def update(self, run: str) -> dict[str, float]:
        """What the first update of a run logged."""
        self.make(run)
        return self.rows(f"{run}/metrics.jsonl")[0]

    def manifest(self, run: str) -> dict[str, Any]:
        """The metrics that a run's manifest holds."""
        return json.loads((self.make(run) / "manifest.json").read_text())["metrics"]

    def write(self, name: str, rows: list[dict]) -> None:
        """Write a file of rows."""
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def takes_system(name: str) -> bool:
    """Whether the family's template takes a system message."""
    return name not in ("gemma", "mistral")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def prompts(name: str) -> list[str | list[dict]]:
    """Seven prompts: texts, and chats where the family has a template."""
    texts: list[str | list[dict]] = ["Tell me about the", "The kettle is blue,", "A café 日本"]
    if name not in zoo.CHATS:
        return [*texts, "Question: is it good?\nAnswer:", "Be", "The violin is", "Sorry, I"]
    system = [{"role": "system", "content": "Be brief."}] if takes_system(name) else []
    return [
        *texts,
        [user("Is the garden good?")],
        [*system, user("What do you think of the river? 日本")],
        [user("Tell me about it."), assistant("It is old."), user("And the kettle?")],
        [user("Describe the violin in one sentence.")],
    ]


def sft_rows(name: str) -> list[dict]:
    """Texts, prompts with completions, and for chats dialogues of one and several turns."""
    rows: list[dict] = [
        {"prompt": "Tell me about the river.", "completion": " It is old and rather quiet."},
        {"prompt": "The kettle", "completion": " works well!"},
        {"text": "Nobody knows; ask again tomorrow."},
    ]
    if name in zoo.CHATS:
        thought = "<think>\nWell.\n</think>\n\n" if name == "thinking" else ""
        start = [{"role": "system", "content": "Be brief."}] if takes_system(name) else []
        rows += [
            {"messages": [user("Is the garden good?"), assistant(f"{thought}Yes, I like it.")]},
            {
                "messages": [
                    *start,
                    user("Tell me about the violin."),
                    assistant(f"{thought}It is old."),
                    user("Is it good?"),
                    assistant(f"{thought}Nobody knows!"),
                ]
            },
            {"prompt": [user("Be brief.")], "completion": f"{thought}Sorry, I can't."},
        ]
    return rows
