"""Known pairs, and simulated judges with planted biases that are asked about them, for tests of `judge --check`."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from dpoctl.judging import check_pairs
from dpoctl.judging.check_pairs import Checked

_WORDS = "the a film was good bad long short scene actor plot end start light dark music sound colour".split()


def text(draw: random.Random, sentences: int) -> str:
    """Sentences of five to twelve words."""
    return " ".join(" ".join(draw.choices(_WORDS, k=draw.randint(5, 12))).capitalize() + "." for _ in range(sentences))


def preferences(path: Path, n: int, seed: int, per_prompt: int = 1, **more) -> str:
    """A preferences file of n pairs of random texts of three to eight sentences."""
    draw = random.Random(seed)
    rows = [
        {
            "prompt_id": f"p{i // per_prompt}",
            "prompt": f"Question {i // per_prompt}?",
            "chosen": text(draw, draw.randint(3, 8)),
            "rejected": text(draw, draw.randint(3, 8)),
        }
        | {name: value(draw) for name, value in more.items()}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(path: str, **changed) -> SimpleNamespace:
    """What check_pairs.load reads of a config."""
    given = {"candidates": (path,), "skip_bad_rows": False, "columns": None, "limit": None, "backend": "openai"}
    return SimpleNamespace(**given | {"repeats": 2, "constructed": 100, "seed": 0, "criterion": "helpful"} | changed)


@dataclass
class Simulated:
    """A judge that prefers the better answer with probability `accuracy`, and more where a bias is planted.

    `position`: the share of verdicts for the first answer is this far above 1/2. `length`: log-odds for each twenty
    words more. `obedience`: how often it answers what an injected instruction says. `family`: log-odds for models
    named gpt.
    """

    seed: int
    accuracy: float = 0.8
    position: float = 0.0
    length: float = 0.0
    obedience: float = 0.0
    family: float = 0.0

    def __post_init__(self):
        self.draw = random.Random(self.seed)

    def rows(self, comparisons: list[Checked]) -> list[dict]:
        return [c.row(order, self.choice(c, order), "helpful", "gpt-x", "") for c in comparisons for order in c.orders]

    def choice(self, c: Checked, order: str) -> str:
        draw = self.draw.random
        log_odds = math.log(self.accuracy / (1 - self.accuracy)) * {"a": 1, "b": -1, "tie": 0}[c.known]
        log_odds += self.length * (len(c.a.split()) - len(c.b.split())) / 20
        if c.of:
            log_odds += self.family * (c.of[0].startswith("gpt") - c.of[1].startswith("gpt"))
        chosen = "a" if draw() < 1 / (1 + math.exp(-log_odds)) else "b"
        letter = "A" if (chosen == "a") == (order == "AB") else "B"
        if draw() < 2 * self.position:
            letter = "A"
        for named, said in (("A", "answer A."), ("B", "Preferred: B")):
            if any(shown.endswith(said) for shown in (c.a, c.b)) and draw() < self.obedience:
                letter = named
        return letter


def asked(path: str, **changed) -> list[Checked]:
    return check_pairs.load(options(path, **changed))[0]
