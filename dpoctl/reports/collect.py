"""Read run directories and row files of several kinds into one collection; the kind is recognised by the content."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.jsonl import read_jsonl
from ..data.readers import load_rows
from ..errors import InputError
from ..inference.evaluation_shards import PART
from ..judging import grades, judge_settings, tournament_summary
from ..judging.check_results import metrics_of_check
from ..judging.judge_settings import JudgedBy
from ..judging.summary import Summary, by_criterion, summaries_by, summarise
from ..outputs.manifests import is_row_file, read_manifest
from ..outputs.tournaments import names_of
from . import origins
from .origins import Origin, Point

_STAGES = ("train-dpo", "train-ppo")  # first in the order of colours, as their methods are in the reward-KL plane
_GRADE_FIELDS = ("prompt_id", "completion", "grade", "criterion", "judge", "of")


@dataclass
class Run:
    """A run directory; without a manifest it is unfinished.

    `points` are the rows of eval.jsonl; `index` gives the run its colour, one in all figures.
    """

    name: str
    stage: str
    options: dict[str, Any]
    metrics: list[dict]
    points: list[Point]
    manifest: dict | None
    index: int = 0
    origin: Origin = Origin()

    @property
    def kept(self) -> dict[str, Any]:
        """`best_step` and `best/METRIC` of a run that keeps the weights of its best evaluation; else empty."""
        found = (self.manifest or {}).get("metrics") or {}
        return {k: v for k, v in found.items() if k.startswith("best")} if "best_step" in found else {}

    @property
    def final_point(self) -> Point:
        """The point of the weights that the run keeps: the last, or that of the best evaluation."""
        step = self.kept.get("best_step")
        return next((p for p in self.points if p["step"] == step), self.points[-1])


@dataclass
class Samples:
    """A completions file: its rows with k = 0, by prompt_id."""

    name: str
    rows: dict[str, dict]


@dataclass
class Judged:
    """A judgements file: a policy judged against another; its summary, and one per temperature and training step.

    `calibration`: of the judge's probabilities, where they were compared with other judgements."""

    name: str
    against: str
    criterion: str
    judge: str
    summary: Summary
    by_temperature: list[Summary]
    by_step: list[Summary]
    judged_by: JudgedBy
    manifest: dict | None = None
    calibration: dict[str, Any] | None = None


@dataclass
class Contest:
    """A tournament's judgements; `metrics` as `tournament_summary.metrics_of` computes them, with its `baseline`."""

    name: str
    metrics: dict[str, Any]
    judged_by: JudgedBy
    manifest: dict | None


@dataclass(frozen=True)
class CheckedJudge:
    """A file of judge --check; `metrics` are those that it computes under "check"."""

    name: str
    metrics: dict[str, Any]
    judged_by: JudgedBy | None = None  # None where the table's caption says it

    @property
    def title(self) -> str:
        m = self.metrics
        return f"{m['judge']} ({m['criterion']}), {m['pairs']} known pairs of {m['prompts']} prompts"


@dataclass
class Graded:
    """The grades of one file's completions by one criterion, of judge --scale."""

    name: str
    criterion: str
    summary: grades.Summary
    judged_by: JudgedBy


@dataclass
class Collected:
    """Everything a report shows; `costs` are (name, manifest) of each input that has one."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Point] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    checked: list[CheckedJudge] = field(default_factory=list)
    graded: list[Graded] = field(default_factory=list)
    contests: list[Contest] = field(default_factory=list)
    costs: list[tuple[str, dict]] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        """Every measured point of the reward-KL plane."""
        return [p for run in self.runs for p in run.points] + self.evaluations

    @property
    def final_points(self) -> list[Point]:
        """What the table of evaluations shows: evaluation files, and the point of each other run's kept weights."""
        evaluated = {p.origin.policy or p.name for p in self.evaluations}
        others = [run for run in self.runs if run.points and not {run.origin.policy, run.name} & evaluated]
        return [run.final_point for run in others] + self.evaluations


def collect(paths: Iterable[str]) -> Collected:
    """Raises InputError for a path of a kind that a report cannot show, and for an invalid row, by file and line.

    Equal names, as those of runs of several seeds, get as many of their folders as make them differ.
    """
    found, names = Collected(), _names(list(dict.fromkeys(paths)))
    for path, name in names.items():
        manifest = read_manifest(path)
        if manifest:
            found.costs.append((name, manifest))
        if Path(path).is_dir():
            if not (Path(path) / "config.yaml").exists():
                hint = "give the output directory of a training command"
                raise InputError(f"{path}: not a run directory (no config.yaml)", hint)
            found.runs.append(_run(Path(path), name, manifest))
        elif is_row_file(path):
            _add_rows(found, path, name, manifest)
        else:
            raise InputError(f"{path}: neither a run directory nor a .jsonl file", hint="see dpoctl report --help")
    order = [*_STAGES, *(run.stage for run in found.runs)]
    for i, run in enumerate(sorted(found.runs, key=lambda run: order.index(run.stage))):
        run.index = i
    return found


def _names(paths: list[str]) -> dict[str, str]:
    """The name of each path in the report."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(name_of(path), []).append(path)
    names: dict[str, str] = {}
    for name, group in groups.items():
        names |= dict(zip(group, names_of(group) if len(group) > 1 else [name], strict=True))
    return {path: names[path] for path in paths}


def name_of(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def policy_of(path: str) -> str:
    """The policy that sampled a completions file, from a file name as in the recipes (samples.dpo.jsonl)."""
    return name_of(path).removeprefix("samples.").removeprefix("scored.")


def _run(path: Path, name: str, manifest: dict | None) -> Run:
    options = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    metrics, points = (_rows_of(path / f"{kind}.jsonl") for kind in ("metrics", "eval"))
    stage = options.pop("stage", "run")
    origin = origins.of_run(manifest)
    measured = [Point(_with_errors(row), origin, name) for row in points]
    return Run(name, stage, options, metrics, measured, manifest, origin=origin)


def _with_errors(point: dict) -> dict:
    """A point whose reward or KL has no standard error (a single prompt) with nan for it, which is not drawn."""
    without = [n for n in ("reward", "kl") if point.get(n) is not None and point.get(f"{n}_se") is None]
    return point | {f"{n}_se": math.nan for n in without}


def _rows_of(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)] if path.exists() and path.stat().st_size else []


def _add_rows(found: Collected, path: str, name: str, manifest: dict | None) -> None:
    first = next((row for _, row in read_jsonl(path)), {})
    if "verdict" in first and first.get("b_k") is not None:
        hint = "make-prefs --judgements reads them; leave the file out"
        raise InputError(f"{path}: compares samples of one file (judge --within), which is no win rate", hint)
    if "check" in first:
        found.checked.append(_checked(path, name, manifest))
    elif "verdict" in first and "a_of" in first:
        found.contests += _contests(path, name, manifest)
    elif "verdict" in first:
        found.judged.extend(_judged(path, manifest))
    elif "grade" in first:
        found.graded.extend(_graded(path, manifest))
    elif "reward" in first:
        rows = load_rows(path, "evaluations").rows
        if any(PART in row for row in rows):
            raise InputError(f"{path}: a shard of evaluate, of a part of the prompts", hint="dpoctl merge joins shards")
        folders = name.rpartition("/")[0]  # of a file whose name others have too
        found.evaluations.extend(
            Point(_evaluation(row), origins.of_row(row, path, manifest), str(Path(folders, Path(row["model"]).name)))
            for row in rows
        )
    elif "completion" in first:
        rows = [row for row in load_rows(path, "completions").rows if row["k"] == 0]
        found.samples.append(Samples(name, {row["prompt_id"]: row for row in rows}))
    elif "chosen" not in first:
        hint = "a report takes evaluations, completions, preferences and judgements"
        raise InputError(f"{path}:1: none of reward, completion, chosen and verdict", hint=hint)
    elif manifest is None:
        raise InputError(f"{path}: preferences without a manifest have nothing to show", hint="leave the file out")


def _evaluation(row: dict) -> dict:
    method = row.get("method") or "model"
    return _with_errors(row) | {"method": "optimum" if method == "ceiling" else method}  # the name in 0.1


def _checked(path: str, name: str, manifest: dict | None) -> CheckedJudge:
    """A file of judge --check, with its metrics as the command computes them."""
    rows = _judgements(path, "order", "check", "known")
    options: dict[str, Any] = manifest["options"] if manifest else {"backend": "openai", "seed": 0}
    metrics = metrics_of_check(rows, options["backend"], options["seed"])["check"]
    return CheckedJudge(name, metrics, _judged_by(rows, manifest))


def _graded(path: str, manifest: dict | None) -> list[Graded]:
    """One for each file that was graded, and each criterion."""
    found: dict[tuple[str, str], list[dict]] = {}
    for line, row in read_jsonl(path):
        if missing := [name for name in _GRADE_FIELDS if name not in row]:
            raise InputError(f"{path}:{line}: field '{missing[0]}': missing; a row of judge --scale has it")
        if not row.get("canary"):
            found.setdefault((row["criterion"], row["of"]), []).append(row)
    return [
        Graded(policy_of(of), criterion, grades.summarise(rows), _judged_by(rows, manifest))
        for (criterion, of), rows in found.items()
    ]


def _judgements(path: str, *more: str) -> list[dict]:
    """The judgements of a file, without those of its canary; `more`: further fields that each has."""
    rows = load_rows(path, "judgements")
    for n, row in enumerate(rows.rows):
        if missing := [name for name in ("criterion", "judge", *more) if name not in row]:
            raise InputError(f"{rows.place(n)}: field '{missing[0]}': missing; a judgement has it")
    return [row for row in rows.rows if not row.get("canary")]


def _contests(path: str, name: str, manifest: dict | None) -> list[Contest]:
    """The tournament of a file by each of its criteria."""
    rows = _judgements(path)
    found = dict.fromkeys(name for row in rows for name in (row["a_of"], row["b_of"]))
    counts: dict[str, Any] = manifest["metrics"] if manifest else {"candidates": list(found), "baseline": None}
    contests = []
    criteria = by_criterion(rows)
    for criterion, judged in criteria.items():
        metrics = tournament_summary.metrics_of(judged, counts["candidates"], counts["baseline"])
        of_criterion = f"{name}, {criterion}" if len(criteria) > 1 else name
        by = _judged_by(judged, manifest)
        contests.append(Contest(of_criterion, {"baseline": counts["baseline"]} | metrics, by, manifest))
    return contests


def _judged_by(rows: list[dict], manifest: dict | None) -> JudgedBy:
    criteria = ", ".join(dict.fromkeys(row["criterion"] for row in rows))
    return judge_settings.judged_by(manifest, (row["judge"] for row in rows), criteria)


def _judged(path: str, manifest: dict | None) -> list[Judged]:
    """One for each criterion of a rubric, which is then part of its name."""
    rows = _judgements(path)
    files = manifest["options"]["candidates"] if manifest else [path]
    criteria = by_criterion(rows)
    return [
        Judged(
            name=policy_of(files[0]) + (f", {criterion}" if len(criteria) > 1 else ""),
            against=policy_of(files[1]) if len(files) > 1 else "reference",
            criterion=criterion,
            judge=", ".join(dict.fromkeys(row["judge"] for row in judged)),
            summary=summarise(judged),
            by_temperature=summaries_by("temperature", judged),
            by_step=summaries_by("step", judged),
            judged_by=_judged_by(judged, manifest),
            manifest=manifest,
            calibration=((manifest or {}).get("metrics") or {}).get("calibration"),
        )
        for criterion, judged in criteria.items()
    ]
