"""Fixtures of the miniature world: each is made once a session, and every file of tests has a copy."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dpoctl import log
from helpers import judging
from helpers.chain import REWARD_MODEL, ROOT, TRAIN, World, dpo, make_world, ppo, wait_until
from helpers.fault_stages import build
from helpers.faults import Lab


@pytest.fixture(autouse=True)
def normal_verbosity():
    """A command of an earlier test in this process may have been quiet."""
    log.set_verbosity(0)


@pytest.fixture(scope="session")
def warm():
    """A dpoctl command whose imports are done. (A command that is killed by SIGKILL starts cold: see World.popen.)"""
    path = Path(tempfile.mkdtemp(prefix="dpoctl-")) / "socket"  # a socket's path has at most 107 characters
    script = str(ROOT / "tests" / "helpers" / "warm.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    server = subprocess.Popen([sys.executable, script, str(path), "--serve"], env=env)
    wait_until(path.exists, server)
    yield [sys.executable, "-S", "-E", script, str(path)]
    server.kill()
    server.wait()
    shutil.rmtree(path.parent)


@pytest.fixture
def warm_judge(warm, monkeypatch):
    """Judges that are waited for are forked from a process whose imports are done."""
    monkeypatch.setattr(judging, "command", warm)


@pytest.fixture(scope="session")
def made(tmp_path_factory, warm) -> World:
    """Small models and rows, see `make_world`; the fixtures `made_...` add to them, and tests nothing."""
    folder = tmp_path_factory.mktemp("made")
    make_world(folder)
    return World(folder, warm)


@pytest.fixture(scope="session")
def made_prefs(made) -> World:
    made.run("sft --model lm --data sft.jsonl --eval-data held.jsonl --lr 1e-3", *TRAIN, "--out sft")
    made.run(
        "make-prefs --model sft --prompts train.jsonl --scorer classifier --max-new-tokens 20 "
        "--generation-batch-size 16 --completions-out samples.jsonl --out prefs.jsonl",
    )
    return made


@pytest.fixture(scope="session")
def made_trained(made_prefs) -> World:
    made_prefs.run(*dpo("dpo"))
    return made_prefs


@pytest.fixture(scope="session")
def made_rewarded(made_prefs) -> World:
    made_prefs.run(*REWARD_MODEL, "--out rm")
    return made_prefs


@pytest.fixture(scope="session")
def made_optimised(made_rewarded) -> World:
    made_rewarded.run(*ppo("ppo"))
    return made_rewarded


@pytest.fixture(scope="module")
def world(made, tmp_path_factory) -> World:
    """Small models and rows in a folder of this file of tests: names of outputs never meet those of another."""
    return World(tmp_path_factory.mktemp("world"), made.warm).filled(made)


@pytest.fixture(scope="module")
def prefs(world, made_prefs) -> World:
    """With a model `sft` trained on the reviews, and preferences of its samples by the classifier."""
    return world.filled(made_prefs)


@pytest.fixture(scope="module")
def trained(prefs, made_trained) -> World:
    """With `dpo`, trained on the preferences."""
    return prefs.filled(made_trained)


@pytest.fixture(scope="module")
def rewarded(prefs, made_rewarded) -> World:
    """With `rm`, a reward model trained on the preferences."""
    return prefs.filled(made_rewarded)


@pytest.fixture(scope="module")
def optimised(rewarded, made_optimised) -> World:
    """With `ppo`, trained on the reward model's scores."""
    return rewarded.filled(made_optimised)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def here(prefs, monkeypatch):
    """The world with preferences as the working directory."""
    monkeypatch.chdir(prefs.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", prefs.env["XDG_CACHE_HOME"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return prefs


@pytest.fixture(scope="session")
def lab(made, tmp_path_factory) -> Lab:
    """Where faults are injected: forked children; undisturbed runs made the inputs of each stage."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    build(lab, made.folder)
    return lab
