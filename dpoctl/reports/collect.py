"""Read run directories, evaluation, completions and preference files into one collection, told apart by content."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.schema import load_rows, read_jsonl
from ..errors import InputError
from ..judging.summary import summaries_by, summarise
from ..outputs.manifests import is_row_file, read_manifest


@dataclass
class Run:
    """A run directory; without a manifest it is unfinished."""

    name: str
    stage: str
    options: dict[str, Any]
    metrics: list[dict]
    points: list[dict]
    manifest: dict | None


@dataclass
class Samples:
    """A completions file: its rows by prompt_id (k = 0)."""

    name: str
    rows: dict[str, dict]


@dataclass
class Judged:
    """A judgements file: who was judged against whom, the summary, and one for each temperature and training step."""

    name: str
    against: str
    criterion: str
    judge: str
    summary: dict[str, Any]
    by_temperature: list[dict]
    by_step: list[dict]


@dataclass
class Collected:
    runs: list[Run] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    costs: list[tuple[str, dict]] = field(default_factory=list)

    @property
    def points(self) -> list[dict]:
        """Every measured point of the reward-KL plane."""
        return [p for run in self.runs for p in run.points] + self.evaluations


def collect(paths: tuple[str, ...]) -> Collected:
    """Raises InputError for a path that is nothing a report can show, and for a broken row, by file and line."""
    found = Collected()
    for path in paths:
        manifest = read_manifest(path)
        if manifest:
            found.costs.append((name_of(path), manifest))
        if Path(path).is_dir():
            if not (Path(path) / "config.yaml").exists():
                raise InputError(
                    f"{path}: not a run directory (no config.yaml)", hint="give what sft or train-dpo wrote"
                )
            found.runs.append(_run(Path(path), manifest))
        elif is_row_file(path):
            _add_rows(found, path, manifest)
        else:
            raise InputError(f"{path}: neither a run directory nor a .jsonl file", hint="see dpoctl report --help")
    return found


def name_of(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def policy_of(path: str) -> str:
    """Whose completions a file holds, by its name: what stands before it in the recipes (samples.dpo.jsonl) goes."""
    return name_of(path).removeprefix("samples.").removeprefix("scored.")


def _run(path: Path, manifest: dict | None) -> Run:
    options = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    rows = {name: _rows_of(path / f"{name}.jsonl") for name in ("metrics", "eval")}
    points = [_with_errors(row) for row in rows["eval"]]
    return Run(path.name, options.pop("stage", "run"), options, rows["metrics"], points, manifest)


def _with_errors(point: dict) -> dict:
    """A point whose reward or KL has no standard error (one prompt alone) with nan for it, which plots as none."""
    alone = [n for n in ("reward", "kl") if point.get(n) is not None and point.get(f"{n}_se") is None]
    return point | {f"{n}_se": math.nan for n in alone}


def _rows_of(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)] if path.exists() and path.stat().st_size else []


def _add_rows(found: Collected, path: str, manifest: dict | None) -> None:
    first = next((row for _, row in read_jsonl(path)), {})
    if "verdict" in first:
        found.judged.append(_judged(path, manifest))
    elif "reward" in first:
        found.evaluations.extend(map(_with_errors, load_rows(path, "evaluations").rows))
    elif "completion" in first:
        rows = [row for row in load_rows(path, "completions").rows if row["k"] == 0]
        found.samples.append(Samples(name_of(path), {row["prompt_id"]: row for row in rows}))
    elif "chosen" not in first:
        hint = "a report takes evaluations, completions, preferences and judgements"
        raise InputError(f"{path}:1: neither reward, completion, chosen nor verdict", hint=hint)
    elif manifest is None:
        raise InputError(f"{path}: preferences without a manifest have nothing to show", hint="leave the file out")


def _judged(path: str, manifest: dict | None) -> Judged:
    rows = []
    for line, row in read_jsonl(path):
        missing = [name for name in ("prompt_id", "k", "a", "b", "verdict", "criterion", "judge") if name not in row]
        if missing:
            raise InputError(f"{path}:{line}: field '{missing[0]}': expected a judgement's, got nothing")
        if not row.get("canary"):
            rows.append(row)
    files = manifest["options"]["candidates"] if manifest else [path]
    against = policy_of(files[1]) if len(files) > 1 else "reference"
    judges = ", ".join(dict.fromkeys(row["judge"] for row in rows))
    by = {name: summaries_by(name, rows) for name in ("temperature", "step")}
    return Judged(
        policy_of(files[0]), against, rows[0]["criterion"], judges, summarise(rows), by["temperature"], by["step"]
    )
