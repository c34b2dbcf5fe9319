"""The chain of recipes/toy at its size: run twice, and run with a SIGKILL in each stage, it ends in the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chain import COLD, ROOT
from helpers.faults import contents, differences

# In place of dpoctl: the command is killed within the seconds that it takes undisturbed, and given again.
KILLER = """
import json, os, random, subprocess, sys, time
known, kill, command = sys.argv[1], sys.argv[2] == "kill", sys.argv[3:]
key, start = json.dumps(command), time.monotonic()
seconds = json.load(open(known)) if os.path.exists(known) else {}
process = subprocess.Popen(command)
if kill:
    try:
        process.wait(random.Random(key).uniform(0.2, 0.65) * seconds[key])
        print("not killed:", key, file=sys.stderr)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        process = subprocess.Popen(command)
code = process.wait()
if not kill:
    json.dump(seconds | {key: time.monotonic() - start}, open(known, "w"))
sys.exit(code)
"""


def chain(folder: Path, how: str = "calm") -> tuple[dict[str, str], int, str]:
    """(what the chain left, its stages, what they said): of the report, which shows seconds, the figures alone."""
    shutil.rmtree(folder / "recipes", ignore_errors=True)
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("runs", "smoke"))
    (folder / "killer.py").write_text(KILLER)
    known = folder / "seconds.json"
    command = [sys.executable, str(folder / "killer.py"), str(known), how, *COLD]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    env["OMP_NUM_THREADS"] = "1"
    env = {name: value for name, value in env.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    toy = folder / "recipes" / "toy"
    done = subprocess.run(["make", f"DPOCTL={' '.join(command)}"], cwd=toy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    left = {
        n: digest
        for n, digest in contents(toy / "runs").items()
        if n not in ("report/report.html", "report/manifest.json")
    }
    return left, len(json.loads(known.read_text())), done.stderr


@pytest.mark.slow
def test_the_same_bytes_twice_and_with_a_kill_in_each_stage(tmp_path):
    first, stages, _ = chain(tmp_path)
    assert stages > 15 and "dpo-0.1/model.safetensors" in first
    second, *_ = chain(tmp_path)
    assert not differences(first, second)
    killed, _, said = chain(tmp_path, "kill")
    assert "not killed" not in said
    assert not differences(first, killed)
