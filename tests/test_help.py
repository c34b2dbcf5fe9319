"""The help as a newcomer reads it: what it shows, in which order, how fast, and that its examples can be typed."""

import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import fields

import pytest

from dpoctl.cli import command, help, pages
from dpoctl.cli.app import run
from dpoctl.config.commands import COMMANDS
from dpoctl.config.schema import flag_of, is_required, spec_of
from dpoctl.config.shared import PANELS, ModelOptions
from helpers.chain import ROOT

TITLE = re.compile(r"╭─ (.+?) ─+╮")
HEAVY = {"torch", "transformers", "datasets", "numpy", "matplotlib", "pydantic"}


@pytest.fixture
def page(capsys, monkeypatch):
    """A function from a command's arguments to what it prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def text(*argv: str) -> str:
        capsys.readouterr()
        assert run([*argv]) == 0
        return capsys.readouterr().out

    return text


def panels_of(text: str) -> dict[str, str]:
    """Panel title -> the panel's lines."""
    parts = TITLE.split(text)[1:]
    return {title: body.partition("╰")[0] for title, body in zip(parts[::2], parts[1::2], strict=True)}


def test_every_command_has_a_page():
    assert set(pages.PAGES) == {*COMMANDS, "init", "docs", "env"}


@pytest.mark.parametrize("name", pages.PAGES)
def test_sentence_then_required_options_then_panels_then_examples(name, page):
    text = page(name, "--help")
    lines = text.splitlines()
    assert lines[0] == pages.PAGES[name].summary and lines[2].startswith(f"Usage: dpoctl {name} ")
    titles = TITLE.findall(text)
    assert titles[0] == ("Required" if name in COMMANDS else "Arguments" if name != "env" else "Run")
    known = [title for title in titles if title in PANELS]
    assert known == [panel for panel in PANELS if panel in known]
    options = [title for title in titles if not title.startswith("SCORER")]
    assert options[-1] == "Run" and len(set(titles)) == len(titles)
    examples = text[text.index("\nExamples\n") :].splitlines()
    assert text.rindex("╯") < text.index("\nExamples\n")
    shown = [line.strip() for line in examples[3:]]
    assert shown == [line.strip() for line in "\n".join(pages.PAGES[name].examples).splitlines()]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_required_options_are_in_their_panel_and_in_the_usage(name, page):
    text = page(name, "--help")
    usage = " ".join(text[text.index("Usage:") : text.index("╭")].split())
    required = [f for f in fields(COMMANDS[name]) if is_required(f)]
    assert required
    for f in required:
        flag = flag_of(f)
        assert spec_of(f).argument or (f"{flag} " in usage and f"│ {flag} " in panels_of(text)["Required"])
    for f in fields(COMMANDS[name]):
        if not is_required(f):
            assert f"│ {flag_of(f)} " not in panels_of(text)["Required"]
            assert f"│ {flag_of(f)} " in text


@pytest.mark.parametrize("name", COMMANDS)
def test_descriptions_have_more_than_half_of_80_columns_and_nothing_is_cut(name, page):
    text = page(name, "--help")
    assert "…" not in text
    out = re.search(r"^│ --out \S+ +", text, re.MULTILINE)
    assert out and 10 < len(out[0]) <= 32


@pytest.mark.parametrize(
    ("name", "panel", "before", "after"),
    [
        ("train-dpo", "Optimisation", "--lr", "--warmup-steps"),
        ("sft", "Optimisation", "--batch-size", "--warmup-steps"),
        ("train-ppo", "Optimisation", "--optimizer", "--warmup-steps"),
        ("train-rm", "Optimisation", "--lr", "--epochs"),
        ("train-dpo", "Evaluation", "--scorer", "--scorer-revision"),
        ("sft", "Evaluation", "--eval-prompts", "--ref"),
        ("sample", "Generation", "--scorer", "--scorer-revision"),
        ("judge", "Scoring", "--scorer", "--score-text"),
        ("evaluate", "Data", "--model", "--skip-bad-rows"),
    ],
)
def test_a_panel_starts_with_its_main_options(name, panel, before, after, page):
    shown = panels_of(page(name, "--help"))[panel]
    assert 0 <= shown.index(f"│ {before} ") < shown.index(f"│ {after} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_scorer_notation_is_explained_once(name, page):
    scorers = [f for f in fields(COMMANDS[name]) if spec_of(f).input == "scorer"]
    text = " ".join(page(name, "--help").split())
    assert text.count("python:FILE.py:FUNCTION") == bool(scorers)
    assert text.count("implicit:POLICY,REFERENCE") == bool(scorers)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_default_is_shown_once(name, page):
    text = " ".join(page(name, "--help").replace("│", "").split())
    with_default = [f for f in fields(COMMANDS[name]) if f.default not in (None, ()) and not is_required(f)]
    with_default = [f for f in with_default if f.default is not False]
    assert text.count("[default: ") == len(with_default) > 0
    for f in with_default:
        assert "default" not in spec_of(f).help, flag_of(f)


def test_verbose_is_an_option_of_commands_that_run_a_model(page):
    """Only models print details: elsewhere -v would do nothing."""
    verbose = {name for name in COMMANDS if "--verbose" in page(name, "--help")}
    assert verbose == {name for name, config in COMMANDS.items() if issubclass(config, ModelOptions)}
    assert "report" not in verbose and "train-dpo" in verbose


def test_the_applications_page_has_whole_summaries_by_group_and_the_first_commands(page):
    text = page("--help")
    assert text == page()  # without any argument
    panels = panels_of(text)
    assert list(panels) == ["Data", "Training", "Generation and evaluation", "Results", "Help", "Options"]
    for name, shown in pages.PAGES.items():
        assert re.search(rf"│ {name} +{re.escape(shown.summary)} +│", panels[shown.group])
    assert "…" not in text and "..." not in text.replace("[ARGS]...", "")
    for first in (
        "dpoctl init toy && make -C toy",
        "dpoctl train-dpo --model MODEL",
        "dpoctl docs",
        "--install-completion",
    ):
        assert first in text[text.index("First commands") :]


def commands_in(example: str) -> list[str]:
    lines = [line for line in example.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("dpoctl")]


EXAMPLES = [c for shown in pages.PAGES.values() for example in shown.examples for c in commands_in(example)]


@pytest.mark.parametrize("example", EXAMPLES + [c for e in pages.FIRST_STEPS for c in commands_in(e)])
def test_examples_are_valid(example, monkeypatch):
    """Every option exists, and no combination is refused; the stage itself is not run."""
    words = shlex.split(example)[1:]
    if words[0] not in COMMANDS or "--help" in words:
        return
    seen = []
    monkeypatch.setattr(command, "run_stage", lambda name, config: seen.append((name, config)) or 0)
    assert run(words) == 0
    assert [name for name, _ in seen] == [words[0]]


def test_color_on_a_terminal_unless_no_color_is_set(monkeypatch):
    page = (
        "A sentence.",
        "Usage: x",
        {"Data": [("--data FILE", "Rows. [dim]\\[default: 1][/dim]")]},
        ("Examples", ["x"]),
    )
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36m--data FILE" in help._page(*page)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in help._page(*page)


ANSWERS = [["--help"], ["--version"], ["docs"], ["init"], ["trian-dpo"], ["train-dpo", "--modle", "x"], ["train-dpo"]]
ANSWERS += [[name, "--help"] for name in pages.PAGES]


def test_help_and_mistakes_import_nothing_heavy():
    script = (
        "import sys, contextlib, io\nfrom dpoctl.cli.app import run\n"
        "for argv in eval(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        run(argv)\n"
        "    print(argv, *sorted(set(eval(sys.argv[2])) & set(sys.modules)))\n"
    )
    for argv in ANSWERS:
        heavy = HEAVY - ({"pydantic"} if argv[-1] != "--help" else set())  # typer converts values by pydantic
        done = subprocess.run(
            [sys.executable, "-c", script, repr([argv]), repr(heavy)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout == f"{argv}\n", done.stderr


def test_they_answer_in_under_0_4_s():
    """CPU time of the process, which other tests on the same cores do not change much."""
    seconds = []
    for argv in ANSWERS:
        before = os.times()
        subprocess.run([sys.executable, "-m", "dpoctl", *argv], cwd=ROOT, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert statistics.median(seconds) < 0.4, seconds


TRAIN = ["train-dpo", "--model", "m", "--data", "d.jsonl", "--out", "o"]
SCORE = ["score", "--data", "d.jsonl", "--out", "o.jsonl"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian-dpo"], ["No such command 'trian-dpo'. Did you mean 'train-dpo'", "hint: see dpoctl --help"]),
        (["train-dpo", "--modle", "x"], ["No such option: --modle", "hint: did you mean --model?"]),
        (["--betta"], ["No such option: --betta", "hint: see dpoctl --help"]),
        (["sft", "--epochs"], ["'--epochs' requires an argument", "hint: --epochs: Passes over the data."]),
        (["train-dpo", "--reward", "x"], ["No such option: --reward", "--reward is an option of train-ppo"]),
        ([*SCORE, "--scorer", "implict:a,b"], ["hint: did you mean implicit:a,b?"]),
        ([*TRAIN, "--loss", "DPO"], ["--loss: 'DPO' is not one of sigmoid, ", "hint: DPO's loss is sigmoid"]),
        ([*TRAIN, "--loss", "hinj"], ["hint: did you mean hinge?"]),
        ([*TRAIN, "--alpha", "1"], ["hint: leave it out; it is read with --loss rpo or unlikelihood"]),
        ([*TRAIN, "--alpha", "1", "--lr", "x"], ["sigmoid (leave it out; it is read", "hint: see dpoctl train-dpo"]),
        (
            ["sft", "--epochs", "many", "--batch-size", "1.5", "--data", "d"],
            [
                "--epochs: expected a number, got 'many'",
                "--batch-size: expected a whole number, got '1.5'",
                "--model is required",
            ],
        ),
    ],
)
def test_mistakes(argv, said, capsys):
    assert run(argv) == 2
    err = capsys.readouterr().err
    for text in said:
        assert text in err
    assert err.count("error:") == 1


def test_shell_completion():
    def complete(line: str) -> list[str]:
        env = os.environ | {
            "_DPOCTL_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        done = subprocess.run([sys.executable, "-m", "dpoctl"], cwd=ROOT, env=env, capture_output=True, text=True)
        return done.stdout.split()

    assert complete("dpoctl train-d") == ["train-dpo"]
    assert complete("dpoctl train-dpo --loss si") == ["sigmoid", "sigmoid-norm", "simpo"]
    assert "--label-smoothing" in complete("dpoctl train-dpo --la")
    assert complete("dpoctl init to") == ["toy"]
