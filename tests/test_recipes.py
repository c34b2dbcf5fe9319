"""The recipes themselves: `make smoke` runs the chain of each on tiny models, and what it writes is whole."""

import json
import os
import subprocess
import sys

import pytest

from dpoctl.cli import init
from helpers.chain import ROOT

EXPECTED = {"hh": {"dpo", "best-of-3", "base"}, "tldr": {"dpo", "ppo", "best-of-3"}, "cnn-dm": {"dpo", "ppo"}}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_smoke(recipe, tmp_path, warm):
    folder = tmp_path / recipe
    init.copy(recipe, folder)  # as `dpoctl init` does
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = ["make", "smoke", f"DPOCTL={' '.join(warm)}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = folder / "smoke"
    for name in EXPECTED[recipe]:
        rows = [json.loads(line) for line in (out / f"wins.{name}.jsonl").read_text().splitlines()]
        samples = [json.loads(line) for line in (out / f"samples.{name}.jsonl").read_text().splitlines()]
        # two temperatures of four prompts, each judged in both orders against the human answer
        assert len(samples) == 8 and len(rows) == 16
        assert {(r["prompt_id"], r["temperature"]) for r in rows} == {
            (s["prompt_id"], s["temperature"]) for s in samples
        }
        assert all(r["b"] == s["reference"] for r in rows for s in samples if s["prompt_id"] == r["prompt_id"])
    page = (out / "report" / "report.html").read_text()
    assert "Win rate at each sampling temperature" in page
    assert ("Win rate along training" in page) == (recipe != "cnn-dm")
