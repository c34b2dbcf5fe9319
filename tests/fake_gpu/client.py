"""Command lines on the fake device, and what it saw of them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.chain import ROOT


@dataclass(frozen=True)
class Report:
    """What a command line did on the device.

    `code`: its exit code, None where it raised `error`. `waits`: how often the host waited, by kind and place;
    `updates`: the same for each optimizer step, from the one before. `peak`: the most bytes on the device. `log`: what
    it printed.
    """

    code: int | None
    error: str
    updates: list[dict[str, int]]
    waits: dict[str, int]
    peak: int
    log: str

    def assert_clean(self) -> None:
        assert self.code == 0 and not self.error, f"{self.error}\n{self.log}"


def reads(waits: dict[str, int]) -> int:
    """How often the host waited for a number of the device."""
    return sum(n for place, n in waits.items() if not place.startswith("upload "))


def uploads(waits: dict[str, int]) -> int:
    """How often it waited to copy numbers to the device, which drains the queued work too."""
    return sum(n for place, n in waits.items() if place.startswith("upload "))


class Machine:
    """The process of `machine.py`; starting it takes the seconds in which it imports everything."""

    def __init__(self, folder: Path):
        self.folder = folder
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("machine.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self._answer() == "ready", "the fake device's process did not start"

    def run(
        self,
        *words: str,
        cwd: Path,
        backing: str = "cpu",
        updates: int = 0,
        faults: Sequence[str] = (),
    ) -> Report:
        """Run a command line of dpoctl on the device: as words, or as texts of several words.

        With `updates` it is stopped after so many; 0: it runs to its end.
        """
        assert self.process.stdin
        report, log = self.folder / "report.json", self.folder / "log.txt"
        report.unlink(missing_ok=True)
        request: dict[str, Any] = {"argv": [*" ".join(words).split(), "--device", "cuda"], "cwd": str(cwd)}
        request |= {"backing": backing, "updates": updates, "faults": list(faults)}
        request |= {"report": str(report), "log": str(log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ended = self._answer()
        assert ended == "0" and report.exists(), f"the child ended with {ended}:\n{log.read_text()}"
        return Report(**json.loads(report.read_text()), log=log.read_text())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()
