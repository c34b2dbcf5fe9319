"""metrics.jsonl, timing.jsonl and eval.jsonl of a run: means over everything since the last row, on all ranks."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..outputs.files import json_line, writing
from ..runtime import collectives

Sums = dict[str, tuple[float | Tensor, Any]]
"""name -> (total, weight) of a mean, or (value, min or max) of an extreme; tensors [] on any device are read later."""


def read(values: Sequence[Tensor]) -> list[float]:
    """The numbers of tensors [] as float64, in one copy from each device: the host waits once."""
    found: dict[int, float] = {}
    for device in {v.device for v in values}:
        here = [i for i, v in enumerate(values) if v.device == device]
        numbers = torch.stack([values[i].detach().double() for i in here]).tolist()
        found |= dict(zip(here, numbers, strict=True))
    return [found[i] for i in range(len(values))]


class Meter:
    """Sums and weights by name, and extremes; `take()` returns means and extremes over all ranks.

    What `add_all` is given stays on its device until `settle`, or a method that needs the numbers.
    """

    def __init__(self) -> None:
        self.pending: list[Sums] = []
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.lowest: dict[str, float] = {}
        self.highest: dict[str, float] = {}

    def merge(self) -> None:
        """Add up all ranks' sums on rank 0 and reset the others', so that a checkpoint holds the sums of all ranks."""
        states = collectives.gather(self.state)
        self.restore({})
        if collectives.rank() == 0:
            for state in states:
                for name, total in state["sums"].items():
                    self.add(name, total, state["weights"][name])
                for kept, kind in (("lowest", min), ("highest", max)):
                    self.add_all({name: (value, kind) for name, value in state[kept].items()})

    @property
    def state(self) -> dict[str, dict[str, float]]:
        self.settle()
        return {"sums": self.sums, "weights": self.weights, "lowest": self.lowest, "highest": self.highest}

    def restore(self, state: dict[str, dict[str, float]]) -> None:
        self.pending = []
        for name in ("sums", "weights", "lowest", "highest"):
            setattr(self, name, dict(state.get(name, {})))

    def add(self, name: str, total: float | Tensor, weight: float) -> None:
        self.add_all({name: (total, weight)})

    def add_all(self, metrics: Sums) -> None:
        """Add metrics by name: (total, weight) of a mean, or (value, min) or (value, max) of an extreme."""
        self.pending.append(metrics)

    def settle(self, *others: Tensor) -> list[float]:
        """Add up what is pending, in the order in which it came; returns the numbers of `others`, read with it."""
        pending, self.pending = [item for metrics in self.pending for item in metrics.items()], []
        tensors = [value for _, both in pending for value in both if isinstance(value, Tensor)]
        numbers = iter(read([*others, *tensors]))
        first = [next(numbers) for _ in others]
        for name, both in pending:
            number, kind = (next(numbers) if isinstance(value, Tensor) else value for value in both)
            if kind is min:
                self.lowest[name] = min(self.lowest.get(name, number), number)
            elif kind is max:
                self.highest[name] = max(self.highest.get(name, number), number)
            else:
                self.sums[name] = self.sums.get(name, 0.0) + number
                self.weights[name] = self.weights.get(name, 0.0) + kind
        return first

    def take(self) -> dict[str, float]:
        """Means and extremes over all ranks since the last call."""
        self.merge()
        self.settle()
        means = {n: self.sums[n] / self.weights[n] for n in sorted(self.sums) if self.weights[n] > 0}
        taken = collectives.from_rank_0(means | dict(sorted(self.lowest.items())) | dict(sorted(self.highest.items())))
        self.restore({})
        return taken


class Log:
    """An append-only JSONL file of a run, truncated to its size at the last checkpoint."""

    def __init__(self, path: Path, size: int = 0):
        self.path = path
        if collectives.rank() == 0:
            with writing(path):
                self.file = open(path, "r+b" if path.exists() else "w+b")
                self.file.truncate(size)
                self.file.seek(size)

    def write(self, *rows: dict[str, Any]) -> None:
        if collectives.rank() == 0:
            data = "".join(map(json_line, rows)).encode()
            with writing(self.path, len(data)):
                self.file.write(data)
                self.file.flush()

    def sync(self) -> int:
        """Flush to disk and return the size."""
        if collectives.rank() != 0:
            return 0
        with writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.file.tell()


def rounded(row: dict[str, float], digits: int = 6) -> dict[str, float]:
    """The row with floats of `digits` significant digits: about float32's precision, and readable."""
    return {k: float(f"{v:.{digits}g}") if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()}


class Board:
    """The same metrics on TensorBoard or Weights & Biases, where --log-to asks for one."""

    def __init__(self, kind: str | None, out: Path, options: dict[str, Any]):
        self.kind = kind if collectives.rank() == 0 else None
        self.writer: Any = None
        try:
            if self.kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(out / "tensorboard"))
            elif self.kind == "wandb":
                import wandb

                self.writer = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "dpoctl"),
                    name=out.name,
                    dir=str(out),
                    id=out.name,
                    resume="allow",
                    config=options,
                )
        except ImportError:
            raise InputError(
                f"--log-to {kind}: the package is not installed", hint=f"pip install 'dpoctl[{kind}]'"
            ) from None

    def write(self, step: int, row: dict[str, float]) -> None:
        if self.kind == "tensorboard":
            for name, value in row.items():
                self.writer.add_scalar(name, value, step)
        elif self.kind == "wandb":
            self.writer.log(row, step=step)

    def close(self) -> None:
        if self.kind == "tensorboard":
            self.writer.close()
        elif self.kind == "wandb":
            self.writer.finish()
