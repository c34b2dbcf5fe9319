"""README, pages and recipes tell of what there is: every command, every loss, and no flag that no command has."""

import re
from dataclasses import fields

import pytest

from dpoctl.config.commands import COMMANDS
from dpoctl.config.schema import flag_of, spec_of
from dpoctl.objectives.catalogue import ALWAYS_UNPAIRED, OBJECTIVES
from dpoctl.objectives.preference import LOSSES
from helpers.chain import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "dpoctl" / "docs").glob("*.md"))]
RECIPE_FILES = ("*/README.md", "*/Makefile", "*.mk", "*/recipe.yaml")
RECIPES = [path for pattern in RECIPE_FILES for path in (ROOT / "recipes").glob(pattern)]
FLAGS = {flag_of(f) for config in COMMANDS.values() for f in fields(config) if not spec_of(f).argument}
OTHERS = {  # of every command, of dpoctl itself, of make, torchrun, Slurm and vLLM
    "--config",
    "--help",
    "--version",
    "--json",
    "--install-completion",
    "--no-print-directory",
    "--nproc-per-node",
    "--cpus-per-task",
    "--nv",
    "--served-model-name",
}
RENAMED = {"--wave-rows", "--chooser", "--ceiling", "--thing"}


@pytest.mark.parametrize("path", [*PAGES, *sorted(RECIPES)], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_named_exists(path):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text()))
    allowed = FLAGS | OTHERS
    assert named <= (allowed | RENAMED if path.name == "changelog.md" else allowed)


def test_every_command_and_loss_is_documented():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in [*COMMANDS, *LOSSES] if not re.search(rf"`{name}[` ]", text)] == []
    losses = (ROOT / "dpoctl" / "docs" / "losses.md").read_text()
    assert [name for name in LOSSES if not re.search(rf"^\| `{name}` \|", losses, re.M)] == []


def test_every_option_of_a_loss_is_in_its_row():
    losses = (ROOT / "dpoctl" / "docs" / "losses.md").read_text()
    for name, objective in LOSSES.items():
        row = re.search(rf"^\| `{name}` \|.*$", losses, re.M)[0]
        flags = set(re.findall(r"`(--[a-z-]+)`", row))
        assert flags == {"--" + option.strip("_").replace("_", "-") for option in objective.options}, name


def test_every_test_file_is_described():
    text = (ROOT / "tests" / "README.md").read_text()
    files = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert files == set(re.findall(r"`(test_\w+\.py)`", text))


def test_the_losses_are_counted():
    others = len(OBJECTIVES) + len(ALWAYS_UNPAIRED) - 1
    assert f"by DPO or one of {others} related losses" in PAGES[0].read_text(encoding="utf-8")
