"""What the tests of losses in training share: a small policy, another reference, rows, and a plain computation."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpoctl.cli.app import run
from dpoctl.runtime import signals
from dpoctl.training import loop

from .encoding import build
from .tiny_models import tiny_model


def write(name: str, rows: list[dict]) -> None:
    with open(name, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def small_models(folder: Path) -> Path:
    """Write a policy, m, and another reference with the same tokenizer, r."""
    tokenizer = build("bpe")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    for name, seed in (("m", 0), ("r", 1)):
        model = tiny_model("gpt2", vocab=len(tokenizer), context=64, width=16, heads=2, std=0.1, **ids)
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += 0.05 * seed * torch.randn_like(p)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def enter(folder: Path, tmp_path: Path, monkeypatch, rows: list[dict]) -> Path:
    """Make `tmp_path` the working directory, with links to the models of `folder`, its cache, and rows.jsonl."""
    for name in ("m", "r"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", rows)
    return tmp_path


def caller(capsys) -> Callable[[str], tuple[int, str]]:
    """A function from a command line to (exit code, what it said)."""

    def call(line: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run(line.split())
        return code, " ".join(capsys.readouterr().err.split())

    return call


def assert_resumed_with_the_same_bytes(command, line: str, here: Path, monkeypatch) -> dict:
    """Run `line` whole, and again stopped after update 3 and resumed; returns the task's state in the checkpoint."""
    assert command(f"{line} --out whole")[0] == 0
    update = loop.Trainer.update

    def stopped(self, step, meter):
        found = update(self, step, meter)
        monkeypatch.setattr(signals.stop, "signal", "SIGTERM" if step == 2 else "")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "update", stopped)
        assert command(f"{line} --out cut")[0] == 75
    monkeypatch.setattr(signals.stop, "signal", "")
    state = json.loads((here / "cut/checkpoints/step-00000003/state.json").read_text())["task"]
    code, said = command(f"{line} --out cut")
    assert code == 0 and "resuming after update 3" in said, said
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (here / "whole" / file).read_bytes() == (here / "cut" / file).read_bytes(), file
    return state


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Plain:
    """Token log-probs by the own forward of a model in float64, one text at a time."""

    def __init__(self, path: str):
        self.model = AutoModelForCausalLM.from_pretrained(path).double().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def tokens(self, prompt: str, completion: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p [n] of the completion's tokens, log sum p^2 [n] of their distributions)."""
        encode = self.tokenizer.encode
        head = encode(prompt, add_special_tokens=False)
        ids = head + encode(completion, add_special_tokens=False) + [self.tokenizer.eos_token_id]
        logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)[len(head) - 1 : -1]
        return logps.gather(1, torch.tensor(ids[len(head) :])[:, None])[:, 0], (2 * logps).logsumexp(-1)
