"""The miniature world that the tests of the chain share: made once, then only added to."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from helpers.chain import ROOT, TRAIN, World, dpo, make_world
from helpers.fault_stages import build
from helpers.faults import Lab


@pytest.fixture(scope="session")
def warm():
    """A dpoctl command whose imports are done. (What a test kills by SIGKILL, it starts cold: see World.popen.)"""
    path = Path(tempfile.mkdtemp(prefix="dpoctl-")) / "socket"  # its path has to be short
    script = str(ROOT / "tests" / "helpers" / "warm.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    server = subprocess.Popen([sys.executable, script, str(path), "--serve"], env=env)
    while not path.exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield [sys.executable, "-S", "-E", script, str(path)]
    server.kill()
    server.wait()
    shutil.rmtree(path.parent)


@pytest.fixture(scope="session")
def world(tmp_path_factory, warm) -> World:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return World(folder, warm)


@pytest.fixture(scope="session")
def prefs(world) -> World:
    world.run(
        *"sft --model lm --data sft.jsonl --eval-data held.jsonl --lr 1e-3".split(),
        *TRAIN,
        "--out",
        "sft",
    )
    world.run(
        *(
            "make-prefs --model sft --prompts train.jsonl --scorer classifier --max-new-tokens 20 "
            "--generation-batch-size 16 --completions-out samples.jsonl --out prefs.jsonl"
        ).split(),
    )
    return world


@pytest.fixture(scope="session")
def trained(prefs) -> World:
    prefs.run(*dpo("dpo"))
    return prefs


@pytest.fixture
def here(prefs, monkeypatch):
    """The world with preferences as the working directory."""
    monkeypatch.chdir(prefs.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", prefs.env["XDG_CACHE_HOME"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return prefs


@pytest.fixture(scope="session")
def lab(world, tmp_path_factory) -> Lab:
    """Where faults are injected: forked children, each stage's inputs made by undisturbed runs."""
    made = Lab(tmp_path_factory.mktemp("lab"))
    build(made, world.folder)
    return made
