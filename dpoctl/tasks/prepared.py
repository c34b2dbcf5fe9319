"""What preparing a task yields, before the stage writes it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prepared:
    """The rows of each file by its name, with what the manifest records beside them.

    `model_files`: files that the task has already written under --out. `dropped`: source rows that were left out, by
    reason; None where a task never drops any.
    """

    files: dict[str, list[dict]]
    dropped: dict[str, int] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    model_files: tuple[Path, ...] = ()
