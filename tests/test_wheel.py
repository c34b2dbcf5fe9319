"""The built wheel, installed alone: recipes, documentation and templates are in it, and work from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dpoctl.cli import docs
from helpers.chain import ROOT

PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that a wheel of this tree is installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*PIP, *build], check=True)
    wheel = next(folder.glob("dpoctl-*.whl"))
    subprocess.run(
        [*PIP, "install", str(wheel), "--no-deps", "--no-index", "--target", str(folder / "site")], check=True
    )
    return folder


@pytest.fixture
def dpoctl(installed, tmp_path):
    """A function that runs the installed dpoctl in an empty folder, and returns its stdout."""

    def call(*argv: str) -> str:
        env = os.environ | {"PYTHONPATH": str(installed / "site")}
        done = subprocess.run(
            [sys.executable, "-m", "dpoctl", *argv], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_everything_that_is_read_at_run_time_is_in_it(installed):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    expected = {path for path in tracked if path.startswith("dpoctl/")}
    expected |= {f"dpoctl/{path}" for path in tracked if path.startswith("recipes/")}
    with zipfile.ZipFile(next(installed.glob("dpoctl-*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert expected <= names, expected - names
    assert not [name for name in names if "/runs/" in name or "/smoke/" in name or name.startswith("tests/")]


def test_init_and_docs_work_from_it(dpoctl, installed, tmp_path):
    assert "toy" in dpoctl("init")
    dpoctl("init", "toy")
    env = os.environ | {"PYTHONPATH": str(installed / "site")}
    command = ["make", "-n", "-C", "toy", f"DPOCTL={sys.executable} -m dpoctl"]
    rules = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert rules.returncode == 0 and " prepare toy --config recipe.yaml" in rules.stdout
    assert [line.split()[0] for line in dpoctl("docs").splitlines() if line] == list(docs.topics())
    assert "Usage: dpoctl train-dpo" in dpoctl("train-dpo", "--help")


def test_templates_are_found(installed):
    """The templates of the report and of the form for people, where the package has them as files."""
    here = {p.relative_to(ROOT) for p in (ROOT / "dpoctl").rglob("*.j2")}
    there = {p.relative_to(installed / "site") for p in (installed / "site" / "dpoctl").rglob("*.j2")}
    assert here, "no templates are found"
    assert here == there
