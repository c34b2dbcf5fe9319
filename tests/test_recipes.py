"""The recipes themselves: `make smoke` runs the chain of each on tiny models, and what it writes is whole."""

import json
import os
import subprocess

import pytest

from dpoctl.cli import init
from helpers.chain import ROOT

EXPECTED = {"hh": {"dpo", "best-of-3", "base"}, "tldr": {"dpo", "ppo", "best-of-3"}, "cnn-dm": {"dpo", "ppo"}}


@pytest.mark.parametrize("recipe", ["hh", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tldr", "cnn-dm"))])
def test_smoke(recipe, tmp_path, warm):
    folder = tmp_path / recipe
    init.copy(recipe, folder)  # as `dpoctl init` does
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = ["make", "smoke", f"DPOCTL={' '.join(warm)}", f"PYTHON={' '.join(warm)}"]
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


# --- targets and what makes them, with a stand-in for dpoctl that writes manifests alone


STAND_IN = """#!/bin/sh
echo "$@" >> commands
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
mkdir -p $(dirname $out)
case $out in *.jsonl) touch $out $out.manifest.json ;; *) mkdir -p $out; touch $out/manifest.json ;; esac
"""


class Folder:
    """A recipe whose commands are recorded."""

    def __init__(self, recipe, folder):
        init.copy(recipe, folder)
        (folder / "stand-in").write_text(STAND_IN)
        (folder / "stand-in").chmod(0o755)
        self.path = folder

    def make(self, *variables):
        """The --out of every command that make runs; no file is removed."""
        log = self.path / "commands"
        log.unlink(missing_ok=True)
        command = ["make", "DPOCTL=./stand-in", *variables]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=True)
        assert not [line for line in done.stdout.splitlines() if line.startswith("rm ")]
        return [line.split("--out ")[1].split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def options(self, out):
        """The command that wrote --out."""
        [line] = [line for line in (self.path / "commands").read_text().splitlines() if line.endswith(f"--out {out}")]
        return line


ROUNDS = "runs/split-3/beta-0.1"


@pytest.fixture
def online(tmp_path):
    return Folder("online", tmp_path / "online")


def test_rounds_start_from_the_policy_before_them_and_keep_the_reference(online):
    made = online.make()
    assert len(made) == len(set(made)) == 21
    for n, start in ((1, "runs/sft"), (2, f"{ROUNDS}/round-1"), (3, f"{ROUNDS}/round-2")):
        train = online.options(f"{ROUNDS}/round-{n}")
        data = "runs/sft.part-1-of-3.jsonl" if n == 1 else f"{ROUNDS}/round-{n}.jsonl"
        assert f"--model {start} --ref runs/sft --data {data} --beta 0.1 " in train
        prefs = online.options(data)
        assert f"--model {start} --shard {n}/3 " in prefs
        assert f"--model {ROUNDS}/round-{n} --ref runs/sft" in online.options(f"{ROUNDS}/round-{n}.eval.jsonl")
    offline = online.options("runs/split-3/offline-0.1")
    assert [f"--data runs/sft.part-{n}-of-3.jsonl" in offline for n in (1, 2, 3)] == [True] * 3
    assert "--ref" not in offline and "--model runs/sft " in offline


def test_a_complete_chain_is_left_alone_and_resumes_anywhere(online):
    online.make()
    assert online.make() == []
    (online.path / ROUNDS / "round-2.jsonl.manifest.json").unlink()
    later = [f"{ROUNDS}/{name}" for name in ("round-2.jsonl", "round-2", "round-3.jsonl", "round-3")]
    evaluations = [f"{ROUNDS}/round-{n}.eval.jsonl" for n in (2, 3)]
    assert sorted(online.make()) == sorted([*later, *evaluations, f"{ROUNDS}/report-3"])
    assert online.make() == []


def test_another_beta_another_number_of_rounds_and_more_offline_runs(online):
    online.make("PROMPTS=same", "ROUNDS=2")
    more = online.make("PROMPTS=same", "ROUNDS=3")
    same = "runs/same/beta-0.1"
    offline = ["runs/sft.seed-3.jsonl", "runs/same-3/offline-0.1", "runs/same-3/offline-0.1.eval.jsonl"]
    third = [f"{same}/{name}" for name in ("round-3.jsonl", "round-3", "round-3.eval.jsonl", "report-3")]
    assert sorted(more) == sorted([*third, *offline])
    made = online.make("PROMPTS=same", "ROUNDS=3", "OFFLINE_BETAS=0.1 0.05")
    assert made == ["runs/same-3/offline-0.05", "runs/same-3/offline-0.05.eval.jsonl", f"{same}/report-3"]
    assert "runs/same/beta-1/round-3" in online.make("PROMPTS=same", "ROUNDS=3", "BETA=1")
    assert "runs/split-3/beta-0.1/round-3" in online.make()  # shares of the prompts are another chain


def test_what_a_variable_adds_to_a_complete_sweep_is_made(tmp_path):
    toy = Folder("toy", tmp_path / "toy")
    toy.make("frontier", "BETAS=0.1")
    assert toy.make("frontier", "BETAS=0.1") == []
    made = toy.make("frontier", "BETAS=0.1 1")
    assert "runs/dpo-1" in made and "runs/dpo-0.1" not in made
    assert f"{ROUNDS}/round-3 " in toy.options("runs/frontier")
    assert toy.make("frontier", "BETAS=0.1 1", "ROUNDS=2", "BETA=1")[-2:] == [
        "runs/split-2/beta-1/round-2",
        "runs/frontier",
    ]
    assert (toy.path / "runs" / "dpo-1" / "manifest.json").exists()


def test_samples_that_are_missing_are_made_and_their_win_rates_after_them(tmp_path):
    tldr = Folder("tldr", tmp_path / "tldr")
    assert "runs/samples.dpo.jsonl" in tldr.make()
    assert tldr.make() == []
    (tldr.path / "runs" / "samples.dpo.jsonl.manifest.json").unlink()
    assert tldr.make() == ["runs/samples.dpo.jsonl", "runs/wins.dpo.jsonl", "runs/report"]
