"""Samples of a few prompts, scored by their number of words, in the folder in which a test works."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dpoctl.cli.app import run
from dpoctl.inference import sources
from helpers.judging import KEY, write

TEXTS = {"p0": ["a", "a b", "a b c"], "p1": ["x y", "x", "z w"], "p2": ["one", "one"]}
SCORER = "def words(rows):\n    return [float(len(r['completion'].split())) for r in rows]\n"


def samples(texts: Mapping[str, list[str]] = TEXTS, **more: object) -> list[dict]:
    return [
        {"prompt_id": p, "prompt": f"Say {p}", "completion": text, "k": k, "finish": "stop"} | more
        for p, found in texts.items()
        for k, text in enumerate(found)
    ]


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch, texts: Mapping[str, list[str]] = TEXTS) -> Path:
    """Make a folder the working directory, with words.py, a scorer, and s.jsonl; a batch has four prompts."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(sources, "BATCH", 4)
    (folder / "words.py").write_text(SCORER)
    write(folder / "s.jsonl", samples(texts))
    return folder


def caller(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """A function that runs a command line in this process and returns what it says on one line."""

    def call(line: str, code: int = 0) -> str:
        capsys.readouterr()
        got = run(line.split())
        out, err = capsys.readouterr()
        assert got == code and "Traceback" not in err, err
        return " ".join((err + out).split())

    return call
