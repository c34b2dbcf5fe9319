"""judge by vLLM: `vllm run-batch` answers the files of --batch-files, and --backend vllm in the command's process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.judging import candidates, manifest, rows_of, run
from helpers.tiny_judge import save_judge
from helpers.vllm_server import CPU

pytestmark = pytest.mark.vllm

SMALL = ["--model", "judge", "--max-tokens", "12", "--cache-dir", "answers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two files of candidates, of which one is too long for the judge."""
    found = tmp_path_factory.mktemp("judge")
    save_judge(found / "judge", "Preferred:", " A")
    candidates(found, 5)
    rows = rows_of(found / "a.jsonl")
    rows[3]["completion"] = "word " * 600
    (found / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def run_batch(folder: Path, number: int) -> None:
    module = "vllm.entrypoints.openai.run_batch"  # `vllm run-batch` asks for the metadata of a package named vllm
    names = [f"batch/{kind}-{number:04d}.jsonl" for kind in ("requests", "answers")]
    command = [sys.executable, "-m", module, "-i", names[0], "-o", names[1], "--model", "judge"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    done = subprocess.run(command, cwd=folder, env=os.environ | CPU, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def by_files(folder) -> list[dict]:
    """The rows by answers of `vllm run-batch`."""
    command = ["a.jsonl", "b.jsonl", *SMALL, "--batch-files", "batch", "--out", "j.jsonl"]
    run(folder, *command, code=75)
    run_batch(folder, 1)
    run(folder, *command)
    return rows_of(folder / "j.jsonl")


def test_vllm_answers_the_files(folder, by_files):
    assert len(by_files) == 10 and {row["judge"] for row in by_files} == {"judge"}
    assert {row["reason"] for row in by_files if row["prompt_id"] == "p3"} == {"too long for the judge"}
    others = [row for row in by_files if row["prompt_id"] != "p3"]
    assert [row["verdict"] for row in others] == ["a", "b"] * 4 and {row["raw"] for row in others} == {"Preferred: A"}
    cost = manifest(folder)["cost"]
    assert (cost["batched"], cost["completion_tokens"]) == (8, 8 * 3) and cost["prompt_tokens"] > 8 * 300


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_judge_in_process_gives_the_same_rows(folder, by_files, backend):
    engine = ["--engine-arg", "enforce_eager=true", "--gpu-memory-utilization", "0.3"] if backend == "vllm" else []
    command = ["a.jsonl", "b.jsonl", *SMALL, "--backend", backend, *engine, "--dtype", "float32"]
    run(folder, *command, "--out", f"{backend}.jsonl")
    rows = rows_of(folder / f"{backend}.jsonl")
    assert [row | {"raw": ""} for row in rows] == [row | {"raw": ""} for row in by_files]
    assert [row["raw"] for row in rows if row["prompt_id"] != "p3"] == ["Preferred: A"] * 8
    _, said = run(folder, *command, "--out", "again.jsonl", "--overwrite")
    assert "8 answers came from the cache" in said and "starting vLLM" not in said
