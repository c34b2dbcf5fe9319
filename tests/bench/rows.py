"""`score` over many generated rows: rows a second, and peak memory of a tenth of them beside all (`make bench-rows`).

The scorer is a Python function that costs next to nothing, so what is measured is reading, checking, writing and
syncing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the film was a slow and warm surprise with a plot that held until its very end".split()
SCORER = "def lengths(rows):\n    return [len(row['completion']) / 100 for row in rows]\n"


def generate(path: Path, count: int) -> None:
    with open(path, "w") as f:
        for i in range(count):
            at = i % len(WORDS)
            row = {
                "prompt_id": f"p{i // 4}",
                "prompt": " ".join(WORDS[:at]) or "So",
                "completion": " ".join(WORDS[at:]),
                "k": i % 4,
                "finish": "stop",
            }
            f.write(json.dumps(row) + "\n")


def score(folder: Path, count: int) -> tuple[float, float]:
    """(rows a second, peak memory in GB) of one run."""
    generate(folder / "rows.jsonl", count)
    (folder / "scorer.py").write_text(SCORER)
    command = [
        sys.executable,
        *"-m dpoctl score --data rows.jsonl --scorer python:scorer.py:lengths --out scored.jsonl --overwrite".split(),
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"score: exit {os.waitstatus_to_exitcode(status)}")
    with open(folder / "scored.jsonl") as f:
        assert sum(1 for _ in f) == count
    return count / seconds, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for count in (given.rows // 10, given.rows):
            rate, memory = score(Path(folder), count)
            print(f"{count:>11,} rows: {rate:,.0f} rows/s, peak memory {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
