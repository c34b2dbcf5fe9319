"""What a killed work leaves behind, and what a complete one no longer needs: removed. Standard library only."""

import shutil
from pathlib import Path

BEST = Path("checkpoints") / "best.safetensors"


def remove(path: Path) -> None:
    """Remove a directory or file. A directory goes out of sight first: half of one is never taken for whole."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(".tmp"):
            hidden = path.with_name(f".{path.name}.gone.tmp")  # not the name that a checkpoint is written under
            shutil.rmtree(hidden, ignore_errors=True)
            path = path.rename(hidden)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files and directories of a directory that is dpoctl's, and those of its checkpoints."""
    for place in (folder, folder / "checkpoints"):
        for leftover in place.glob(".*.tmp"):
            remove(leftover)
    if (folder / ".saving").exists():
        shutil.rmtree(folder / ".saving")


def prune(folder: Path, keep: int, best: bool = True) -> None:
    """Keep the newest `keep` checkpoints of a run, the best weights put aside where `best`, and no temporary ones."""
    sweep(folder)
    known = sorted((folder / "checkpoints").glob("step-*"))
    for old in known[: len(known) - keep]:
        remove(old)
    if not best:
        remove(folder / BEST)
    if keep == 0 and (folder / "checkpoints").is_dir():
        remove(folder / "checkpoints")
