"""Every command line of README and the pages is run on tiny models, or at least resolved.

bash gets each block marked `sh` as it is written; the `dpoctl` on its PATH reduces steps and rows
(helpers/docs_command.py). A block after `<!-- not run: REASON -->` is only resolved, which finds unknown options and
impossible combinations.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dpoctl.cli.command
from dpoctl.cli import app
from dpoctl.config.commands import COMMANDS
from dpoctl.data.stored import carried
from helpers import real_models
from helpers.chain import ROOT
from helpers.judge_server import JudgeServer
from helpers.logprobs import between, spelt, with_logprobs

DOCS = ROOT / "dpoctl" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
HELPERS = ("init", "docs", "env")  # commands that resolve no config
_BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_MODELS = {  # what is on the hub, as a directory of the test's world
    "gpt2-large": "lm",
    "HuggingFaceTB/SmolLM2-135M": "lm",
    "siebert/sentiment-roberta-large-english": "classifier",
}


class Block(NamedTuple):
    kind: str
    reason: str | None
    text: str


def blocks(page: Path, kind: str) -> list[Block]:
    """The page's fenced blocks of a kind."""
    found = [Block(m["kind"], m["reason"], m["text"]) for m in _BLOCK.finditer(page.read_text())]
    return [block for block in found if block.kind == kind]


def command_lines(block: Block) -> list[list[str]]:
    """The words of each command in a block: lines joined at backslashes, cut at &&, comments left out."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


def dpoctl_arguments(words: list[str]) -> list[str] | None:
    """The arguments of dpoctl in a command line: alone, by torchrun, or in a batch file of recipes/slurm."""
    if words[0] == "dpoctl":
        return words[1:]
    if words[0] == "torchrun":
        return words[words.index("dpoctl") + 1 :]
    return None


def written(page: Path) -> set[str]:
    """What the page's own commands write."""
    found = set()
    for block in blocks(page, "sh"):
        for words in command_lines(block) if block.reason is None else []:
            found |= {words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out" and "--dry-run" not in words}
    return found


RUN = [page for page in PAGES if any(b.reason is None for b in blocks(page, "sh"))]
PARSED = [page for page in PAGES if any(b.reason for b in blocks(page, "sh"))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- the miniature world, under the names that the pages use


@pytest.fixture(scope="module")
def given(prefs, tmp_path_factory) -> dict[str, Path]:
    """Name in the pages -> file or directory, of everything that a page may take for granted."""
    world, made = prefs, tmp_path_factory.mktemp("given")
    found = {name: world.folder / folder for name, folder in _MODELS.items()}
    found |= {"imdb/sft.jsonl": world.folder / "sft.jsonl", "runs/sft": world.folder / "sft"}
    found |= {f"imdb/prompts.{part}.jsonl": world.folder / f"{part}.jsonl" for part in ("train", "test")}
    found |= {name: world.folder / "prefs.jsonl" for name in ("prefs.jsonl", "held-out.jsonl")}

    def run(*argv: str) -> None:
        subprocess.run([*world.warm, *argv], cwd=world.folder, env=world.env, check=True, capture_output=True)

    few = ["--max-steps", "1", "--max-length", "96", "--max-prompt-length", "16"]
    run("train-dpo", "--model", "sft", "--data", "prefs.jsonl", *few, "--out", f"{made}/dpo")
    run("train-rm", "--model", "sft", "--data", "prefs.jsonl", *few, "--out", f"{made}/rm")
    sampled = made / "samples.jsonl"
    run("sample", "--model", "sft", "--prompts", "test.jsonl", "--max-new-tokens", "8", "--out", str(sampled))
    found |= {f"runs/{run}": made / run for run in ("dpo", "rm")}
    samples = [json.loads(line) for line in sampled.read_text().splitlines()]
    found |= {f"models/{name}": real_models.write(made / name, name) for name in ("llama-8b", "llama-70b")}
    found |= {file: sampled for file in ("samples.jsonl", "dpo.jsonl", "sft.jsonl", "best.jsonl")}
    shot = {"prompt": "A film", "completion": " I liked."}
    rows = {
        "summaries": [row | {"reference": "A quiet film about a harbour."} for row in samples],
        "base": [carried(row) | {"completion": "It ends."} for row in samples],
        "ppo": [carried(row) | {"completion": "I liked it."} for row in samples],
        "shots": [shot],
        "reviews": [json.loads(line) for line in (world.folder / "sft.jsonl").read_text().splitlines()],
    }
    for file, content in rows.items():
        found[f"{file}.jsonl"] = made / f"{file}.jsonl"
        found[f"{file}.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in content))
    shown = {  # what the pages show is what their commands read
        "my-preferences.jsonl": blocks(ROOT / "README.md", "json"),
        "my-recipe.yaml": blocks(DOCS / "options.md", "yaml"),
        "length.py": blocks(DOCS / "options.md", "python"),
    }
    pairs = [json.loads(line) for line in (world.folder / "prefs.jsonl").read_text().splitlines()]
    found |= {name: made / name for name in ("my-preferences.csv", "my-alpaca.json")}
    with open(made / "my-preferences.csv", "w", newline="") as file_:
        table = csv.DictWriter(file_, ["prompt", "chosen", "rejected"], extrasaction="ignore")
        table.writeheader()
        table.writerows(pairs)
    alpaca = [
        {"instruction": r["prompt"], "input": "", "chosen": r["chosen"], "rejected": r["rejected"]} for r in pairs
    ]
    found["weighted-prefs.jsonl"] = made / "weighted-prefs.jsonl"
    weighted = [json.dumps(row | {"weight": 1.0 + i % 3}) + "\n" for i, row in enumerate(pairs)]
    found["weighted-prefs.jsonl"].write_text("".join(weighted))
    found["reward-bench.jsonl"] = made / "reward-bench.jsonl"
    of_subsets = [json.dumps(row | {"subset": f"subset-{i % 3}"}) + "\n" for i, row in enumerate(pairs)]
    found["reward-bench.jsonl"].write_text("".join(of_subsets))
    found["feedback.jsonl"] = made / "feedback.jsonl"
    rated = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    found["feedback.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rated))
    (made / "my-alpaca.json").write_text(json.dumps(alpaca))
    for file, (block,) in shown.items():
        found[file] = made / file
        found[file].write_text(block.text)
    return found


@pytest.fixture(scope="module")
def environment(prefs, tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of the blocks: `dpoctl` on the warm server, and a judge that prefers A."""
    binaries = tmp_path_factory.mktemp("bin")
    script = ROOT / "tests" / "helpers" / "docs_command.py"
    (binaries / "dpoctl").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {script} "$@"\n')
    (binaries / "dpoctl").chmod(0o755)
    tokens = ("A", " says", " more", ".\n", "Preferred", ":", between(0.8))
    with JudgeServer(lambda request: with_logprobs("A says more.\nPreferred: A", spelt(*tokens))) as server:
        yield prefs.env | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "DOCS_WARM": json.dumps(prefs.warm),
            "DOCS_JUDGE": server.url,
            "OPENAI_API_KEY": "none",
        }


def lay_out(folder: Path, page: Path, given: dict[str, Path]) -> None:
    """Links to what the page takes for granted; what it writes itself is left out."""
    outs = written(page)
    for file, source in given.items():
        if not any(file == out or file.startswith(f"{out}/") for out in outs):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(source)


# --- the tests


@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_command_line_runs(page, given, environment, tmp_path):
    lay_out(tmp_path, page, given)
    for block in blocks(page, "sh"):
        commands = command_lines(block)
        if block.reason is None and commands[0][0] not in ("make", "pip"):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=180,
            )
            assert done.returncode == 0, f"{block.text}\n{done.stderr}"
            assert "Traceback" not in done.stderr
            for words in commands:
                if words[0] == "dpoctl" and "--out" in words and not {"--dry-run", "--form"} & set(words):
                    assert (tmp_path / words[words.index("--out") + 1]).exists(), words


@pytest.mark.parametrize("page", PARSED, ids=name)
def test_what_cannot_run_here_is_valid(page, monkeypatch):
    resolved = []
    monkeypatch.setattr(dpoctl.cli.command, "run_stage", lambda command, config: resolved.append(command) or 0)
    expected = []
    for block in blocks(page, "sh"):
        for words in command_lines(block) if block.reason else []:
            argv = dpoctl_arguments(words)
            if argv and argv[0] not in HELPERS:
                expected.append(argv[0])
                assert app.run(argv) == 0, words
    assert resolved == expected


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    seen = set()
    for page in PAGES:
        for words in [words for block in blocks(page, "sh") for words in command_lines(block)]:
            if words[0] == "make" and "-C" not in words and "recipes" not in name(page):
                for target in [word for word in words[1:] if "=" not in word]:
                    assert re.search(rf"^{target}:", makefile, re.M), (name(page), words)
                    seen.add(target)
        for listed in re.findall(r"pip install '(?:dpoctl|\.)\[([\w,]+)\]'", page.read_text()):
            assert set(listed.split(",")) <= set(extras), (name(page), listed)
    assert {"demo", "test", "lint"} <= seen


def test_pages_have_titles_and_links_lead_somewhere():
    linked = set()
    for page in PAGES:
        text = page.read_text()
        assert re.match(r"# \S", text), name(page)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("https://"):
                place = (page.parent / target).resolve()
                assert place.is_file(), (name(page), target)
                linked.add(place)
    assert set(DOCS.glob("*.md")) <= linked, "a page that no other page links to"


def test_readme_has_a_row_with_a_link_for_every_command():
    rows = re.findall(r"^\| `([\w-]+)` \|.*\]\(dpoctl/docs/[\w-]+\.md\) \|$", (ROOT / "README.md").read_text(), re.M)
    assert rows == [*sorted(COMMANDS, key=rows.index), *HELPERS]


@pytest.mark.parametrize("recipe", [p.name for p in (ROOT / "recipes").iterdir() if p.is_dir()])
def test_every_recipe_is_listed(recipe):
    assert f"`{recipe}`" in (DOCS / "recipes.md").read_text()
    assert f"`recipes/{recipe}`" in (ROOT / "README.md").read_text()
