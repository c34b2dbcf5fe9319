"""Every fault in every stage: `make torture`, or a part of it: `make torture TORTURE="--stages sft --faults kills"`.

Prints a table of trials by stage and fault and ends nonzero where one was not clean. A trial is clean if the faulty run
ended as it must (killed; or exit 2 with a message) and the command rerun ended in the bytes of an undisturbed run,
with nothing left over.
"""

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from helpers.chain import make_world
from helpers.fault_stages import STAGES, build, small_batches
from helpers.faults import Fault, Lab, Outcome, contents, differences, drop

KILLS, CORRUPTIONS = 20, 50
NOT_ALLOWED_CALLS = ("open", "mkdir", "replace", "rename", "serialize")
NO_ROOM_CALLS = ("open", "write", "fsync", "mkdir", "replace", "rename", "serialize", "tokenizer", "truncate")


@dataclass
class Stage:
    """A stage under torture: its command, and what an undisturbed run of it did."""

    lab: Lab
    name: str
    calls: list[str]
    seconds: float
    undisturbed: dict[str, str]  # digests of what a run without faults writes
    folder: Path
    argv: list[str] = field(default_factory=list)

    def start(self, folder: Path, fault: Fault | None = None):
        return self.lab.start(folder, self.argv, fault, small_batches)

    def run(self, folder: Path, fault: Fault | None = None) -> Outcome:
        return self.lab.run(folder, self.argv, fault, small_batches)

    def rerun(self, folder: Path) -> str:
        """Rerun the command: what is wrong afterwards, or nothing."""
        outcome = self.run(folder)
        if outcome.code:
            return f"rerun: exit {outcome.code}: {outcome.said[-600:]}"
        wrong = differences(contents(folder), self.undisturbed)
        return f"rerun: differs in {', '.join(wrong[:6])}" if wrong else ""


@cache
def measure(lab: Lab, name: str) -> Stage:
    folder, calls, seconds = lab.calls(STAGES[name], small_batches)
    return Stage(lab, name, calls, seconds, contents(folder), folder, STAGES[name])


# --- the faults: each gives trials, a trial is (what, function of a fresh folder -> what is wrong or nothing)


def deaths(stage: Stage, draw: random.Random):
    """A simulated death at every call that changes the disk."""
    for at, call in enumerate(stage.calls, 1):
        yield f"death {at} {call}", lambda folder, at=at: _died(stage, folder, Fault("kill", at))


def _died(stage: Stage, folder: Path, fault: Fault) -> str:
    code = stage.run(folder, fault).code
    return f"exit {code}, not killed" if code != 137 else stage.rerun(folder)


def kills(stage: Stage, draw: random.Random):
    """A real SIGKILL at random instants of the run."""
    for n in range(KILLS):
        after = draw.uniform(0.02, stage.seconds)
        yield f"kill {n} after {after:.3f} s", lambda folder, after=after: _killed(stage, folder, after)


def _killed(stage: Stage, folder: Path, after: float) -> str:
    process = stage.start(folder)
    time.sleep(after)
    process.kill()
    code = stage.lab.end(process, folder).code
    return f"exit {code}" if code not in (-signal.SIGKILL, 0) else stage.rerun(folder)


def no_room(stage: Stage, draw: random.Random):
    """A full disk at every write."""
    for at, call in enumerate(stage.calls, 1):
        if call.split()[0] in NO_ROOM_CALLS:
            yield f"full {at} {call}", lambda folder, at=at: _refused(stage, folder, Fault("error", at, errno.ENOSPC))


def not_allowed(stage: Stage, draw: random.Random):
    """A directory that may not be written, at every call that makes something."""
    for at, call in enumerate(stage.calls, 1):
        if call.split()[0] in NOT_ALLOWED_CALLS:
            yield f"denied {at} {call}", lambda folder, at=at: _refused(stage, folder, Fault("error", at, errno.EACCES))


def size_limit(stage: Stage, draw: random.Random):
    """A limit on file sizes (a real one) at the sizes of what is written, and a byte below."""
    sizes = sorted({p.stat().st_size - 1 for p in stage.folder.rglob("*") if p.is_file() and p.name != "said"})
    for size in sizes if len(sizes) <= 12 else sorted(draw.sample(sizes, 12)):
        if size > 4000:  # below, not even the message finds room: it goes to a file here
            yield f"limit {size}", lambda folder, size=size: _refused(stage, folder, Fault("limit", size))


def _refused(stage: Stage, folder: Path, fault: Fault) -> str:
    """Exit 2 with place and reason; or exit 0 where it was a cache, which only costs time."""
    outcome = stage.run(folder, fault)
    if outcome.code not in (0, 2):
        return f"exit {outcome.code}: {outcome.said[-600:]}"
    if outcome.code == 2 and not ("cannot be written: " in outcome.said and "hint: " in outcome.said):
        return f"says {outcome.said[-600:]}"
    if "Traceback" in outcome.said:
        return f"traceback: {outcome.said[-600:]}"
    return stage.rerun(folder)


def signals(stage: Stage, draw: random.Random):
    """SIGTERM, SIGINT and SIGUSR1 at random instants: 75 at the next boundary (or done); then the same bytes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for _ in range(4):
            after = draw.uniform(0.15, stage.seconds)
            yield f"{number.name} after {after:.3f} s", lambda folder, a=after, n=number: _stopped(stage, folder, a, n)


def _stopped(stage: Stage, folder: Path, after: float, number: int) -> str:
    process = stage.start(folder)
    time.sleep(after)
    if stage.lab.running(process):
        os.kill(process.pid, number)
    outcome = stage.lab.end(process, folder)
    # before dpoctl listened; the process that forks ends a child with 1 where SIGINT finds it before its first line
    early = not outcome.said and outcome.code in (-number, 1)
    return "" if early else stage.rerun(folder) if outcome.code in (0, 75) else f"exit {outcome.code}: {outcome.said}"


def corruptions(stage: Stage, draw: random.Random):
    """A flipped bit or a cut in a file of a killed run, of every kind of file: found, or of no consequence."""
    kept: list[Path] = []
    last = next((i for i, c in reversed(list(enumerate(stage.calls))) if "manifest" not in c and "write" in c), 1)
    for at in sorted({len(stage.calls) // 2, 3 * len(stage.calls) // 4, last}):
        kept.append(stage.lab.folder())
        stage.run(kept[-1], Fault("kill", at))
    found: dict[str, list[tuple[Path, Path]]] = {}
    for folder in kept:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "said"):
            inside = path.relative_to(folder)
            if path.stat().st_size and not inside.parts[0] == "cache":
                found.setdefault(kind_of(inside), []).append((folder, inside))
    for kind, places in found.items():
        for n in range(CORRUPTIONS):
            place, seed = draw.choice(places), draw.random()
            yield f"{kind} {n} {place[1]}", lambda folder, p=place, s=seed: _corrupted(stage, folder, *p, s)


def kind_of(path: Path) -> str:
    return path.name if "checkpoints" in path.parts else path.suffix.lstrip(".") or path.name


def damage(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if draw.random() < 0.5:
        data[at] ^= 1 << draw.randrange(8)
    else:
        del data[at:]
    path.unlink()
    path.write_bytes(data)
    return f"{path.name} at byte {at} of {len(data)}"


def _corrupted(stage: Stage, folder: Path, source: Path, inside: Path, seed: float) -> str:
    """The run resumes to the same bytes, or refuses and names the damage; then --overwrite replaces the output."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    what = damage(folder / inside, random.Random(seed))
    outcome = stage.run(folder)
    if outcome.code == 0:
        # an older checkpoint that the run had no need of is not read, so not mended: its sums tell when it is
        unread = {str(inside)} if "checkpoints" in inside.parts else set()
        wrong = [name for name in differences(contents(folder), stage.undisturbed) if name not in unread]
        return f"{what}: differs in {', '.join(wrong[:6])}" if wrong else ""
    if outcome.code != 2 or "hint: " not in outcome.said or "Traceback" in outcome.said:
        return f"{what}: exit {outcome.code}: {outcome.said[-600:]}"
    if "hint: --overwrite" not in outcome.said:
        return ""
    outcome = stage.lab.run(folder, [*stage.argv, "--overwrite"], None, small_batches)
    wrong = differences(contents(folder), stage.undisturbed) if outcome.code == 0 else [outcome.said[-600:]]
    told = ("manifest.json", "config.yaml")  # where --overwrite is among the options
    wrong = [name for name in wrong if not name.endswith(told)]
    return f"{what}: --overwrite: {', '.join(wrong[:6])}" if wrong else ""


FAULTS = {f.__name__: f for f in (deaths, kills, no_room, not_allowed, size_limit, signals, corruptions)}


# --- all of it


def torture(
    stage: Stage, fault: str, share: float, seed: int, workers: int, most: int | None = None, only: str = ""
) -> tuple[int, list[str]]:
    """(trials, what was not clean) of one fault in one stage: a `share` of the trials or `most`, drawn from `seed`, of
    those whose names hold `only`."""
    draw = random.Random(f"{seed} {stage.name} {fault}")
    trials = [trial for trial in FAULTS[fault](stage, draw) if only in trial[0]]
    if most is not None:
        trials = draw.sample(trials, min(most, len(trials)))
    else:
        trials = [t for t in trials if share >= 1 or draw.random() < share]

    def one(trial) -> str:
        what, run = trial
        folder = stage.lab.folder()
        wrong = run(folder)
        if wrong:
            return f"{stage.name}: {what} ({folder}): {wrong}"
        drop(folder)
        return ""

    with ThreadPoolExecutor(workers) as pool:
        return len(trials), [wrong for wrong in pool.map(one, trials) if wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--share", type=float, default=1.0, help="share of the trials, drawn at random")
    parser.add_argument("--only", default="", help="the trials whose names hold this: a call, a kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--world", type=Path, help="where the miniature world is kept for the next call")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tiny = given.world or Path(temporary) / "tiny"
        if not (tiny / "test.jsonl").exists():
            tiny.mkdir(parents=True, exist_ok=True)
            make_world(tiny)
        lab = Lab(Path(temporary) / "lab")
        lab.world.mkdir()
        build(lab, tiny)
        return report(lab, given)


def report(lab: Lab, given) -> int:
    unclean: list[str] = []
    total = 0
    print(f"{'':<11}" + "".join(f"{name:>13}" for name in given.faults), flush=True)
    for name in given.stages:
        stage, cells = measure(lab, name), []
        for fault in given.faults:
            trials, wrong = torture(stage, fault, given.share, given.seed, given.workers, only=given.only)
            unclean += wrong
            total += trials
            cells.append(f"{trials - len(wrong)}/{trials}")
        print(f"{name:<11}" + "".join(f"{cell:>13}" for cell in cells), flush=True)
    if not total:
        print(f"no trial is named {given.only!r}")
        return 2
    print("\n".join(unclean) if unclean else f"{total} trials, all clean")
    return 1 if unclean else 0


if __name__ == "__main__":
    sys.exit(main())
