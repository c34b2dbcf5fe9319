"""The README tells of what there is: every command, every loss, and no flag that the commands do not have."""

import re
from dataclasses import fields

import pytest

from dpoctl.config.commands import COMMANDS
from dpoctl.config.schema import flag_of, spec_of
from dpoctl.objectives.preference import LOSSES
from helpers.chain import ROOT

TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "recipes").glob("*/README.md")),
    *sorted((ROOT / "recipes").glob("*/Makefile")),
]
FLAGS = {flag_of(f) for config in COMMANDS.values() for f in fields(config) if not spec_of(f).argument}


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_named_exists(path):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text()))
    assert named <= FLAGS | {
        "--config",
        "--help",
        "--version",
        "--no-print-directory",
        "--nproc-per-node",
        "--shutdown-timeout",
    }


def test_every_command_and_loss_is_told_of():
    text = (ROOT / "README.md").read_text()
    assert [name for name in [*COMMANDS, *LOSSES] if f"`{name}" not in text] == []
