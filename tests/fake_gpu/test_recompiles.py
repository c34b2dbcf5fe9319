"""How many variants of the compiled attention the shapes of a run ask for, against torch's limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fake_gpu import device
from helpers.chain import ROOT


@pytest.fixture(autouse=True)
def _needs_the_device():
    if reason := device.missing():
        pytest.skip(reason)


def test_shapes_and_windows_stay_within_the_limit():
    """Two windows by turns, with and without gradient, many lengths, and a second model."""
    found = counted()
    assert not found["error"] and not found["eager"]
    variants = found["variants"]
    assert 2 <= variants["reference"] and variants["training"] <= 7
    assert variants["training goes on"] == variants["scorer"], "lengths ask for variants"
    assert variants["training goes on"] < found["limit"]


def test_a_limit_that_is_too_low_is_found():
    found = counted("1")
    assert found["error"] or found["eager"]


def counted(*arguments: str) -> dict:
    """What `recompiles.py` prints."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("recompiles.py"))
    done = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
