"""Removing what a killed command left, and what a complete output no longer needs. Standard library only."""

import shutil
from pathlib import Path

BEST = Path("checkpoints") / "best.safetensors"


def remove(path: Path) -> None:
    """Remove a file or directory; a directory is renamed first, so that a half-removed one never looks complete."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(".tmp"):
            hidden = path.with_name(f".{path.name}.gone.tmp")  # not the name that a checkpoint is written under
            shutil.rmtree(hidden, ignore_errors=True)
            path = path.rename(hidden)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files and directories in a run directory and in its checkpoints."""
    for place in (folder, folder / "checkpoints"):
        for leftover in place.glob(".*.tmp"):
            remove(leftover)
    if (folder / ".saving").exists():
        shutil.rmtree(folder / ".saving")


def prune(folder: Path, keep: int, best: bool = True) -> None:
    """Keep a run's newest `keep` checkpoints, and its best weights if `best`; remove the others and temporary files."""
    remove_temporary(folder)
    known = sorted((folder / "checkpoints").glob("step-*"))
    for old in known[: len(known) - keep]:
        remove(old)
    if not best:
        remove(folder / BEST)
    if keep == 0 and (folder / "checkpoints").is_dir():
        remove(folder / "checkpoints")
