"""`dpoctl judge` in a process, completions files to compare, and a judge that prefers good texts."""

import json
import os
import re
import subprocess
from pathlib import Path

from helpers.chain import COLD, ROOT

KEY = "sk-canary-0123456789abcdef"
command = COLD  # the fixture `warm_judge` puts a forked process in its place


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def candidates(folder: Path, n: int, good: str = "good", bad: str = "bad", **more) -> list[str]:
    """Two completions files of n prompts; A's texts hold `good`, B's `bad`."""
    files = []
    for name, word in (("a", good), ("b", bad)):
        row = {"k": 0, "finish": "stop"} | more
        rows = [{"prompt_id": f"p{i}", "prompt": f"Question {i}?", "completion": f"{word} {i}"} | row for i in range(n)]
        files.append(write(folder / f"{name}.jsonl", rows))
    return files


def run(
    folder: Path, *args: str, code: int = 0, wait: bool = True, stage: str = "judge", starter: list[str] | None = None
):
    """(stdout, stderr) of a judge whose exit code is `code`.

    Without `wait` its process, started as a user does, or by `starter`.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "OPENAI_API_KEY": KEY}
    process = subprocess.Popen(
        [*(starter or (command if wait else COLD)), stage, *map(str, args)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=170)
    assert process.returncode == code, err
    assert "Traceback" not in err and KEY not in out + err
    return out, err


def judged(folder: Path, server, *args: str, code: int = 0) -> str:
    """What is said as the two files are compared by a server, into j.jsonl."""
    more = ["--model", "m", "--base-url", server.url, "--retries", "1", "--out", "j.jsonl", *args]
    return run(folder, "a.jsonl", "b.jsonl", *more, code=code)[1]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "j.jsonl.manifest.json").read_text())


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def fenced(text: str) -> list[str]:
    """The text between the fences of a request: prompt, A, B."""
    fence = re.search(r"lines that read (<<<text-\w+>>>)", text).group(1)
    return [part.strip("\n") for part in text.split("\n" + fence + "\n")[1:6:2]]


def likes_good(text: str) -> str:
    _, a, _ = fenced(text)
    return f"One is better.\nPreferred: {'A' if 'good' in a else 'B'}"
