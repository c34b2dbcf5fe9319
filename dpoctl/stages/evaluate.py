"""Reward, sequence KL to the reference, lengths and fluency of models, or of completions files, on unseen prompts.

A completions file has a KL where its rows carry their token ids, and --model is the policy that sampled them.
"""

import json
from dataclasses import replace
from typing import Any, NamedTuple

from .. import log
from ..config.sampling import Evaluate
from ..data.readers import Rows, load_rows
from ..errors import InputError
from ..inference import curves
from ..inference.completions import prompt_set
from ..inference.engine_planning import engine_lines
from ..inference.engine_samples import EngineSamples, compared
from ..inference.evaluation_planning import EvaluationPlan
from ..inference.evaluation_shards import PART, part_of
from ..inference.generate import batch_slices
from ..inference.options import template_options
from ..inference.policy_evaluation import (
    NO_KL,
    NamedModel,
    PolicyEvaluation,
    Reference,
    kl_temperature,
    length_of,
    perplexity,
    perplexity_of_lm,
    statistics,
    tokens_of,
)
from ..inference.scorer_text import completion_of
from ..inference.scorers import Scorer, load_scorer, scorer_options
from ..inference.stored_samples import not_plain, stored_samples
from ..inference.values import beta_of_samples, require_values, use_values
from ..models.load import Loaded, context_length, load_policy
from ..models.place import Place
from ..models.pretrained import silence_transformers
from ..models.tokenizers import require_same_tokenizer
from ..outputs.claims import Output
from ..outputs.manifests import read_manifest, sampling_manifest
from ..outputs.row_writer import RowWriter
from ..outputs.shard_totals import of_evaluate
from ..outputs.shards import ShardRange, shard_range, slices
from ..reports import tables
from ..runtime import collectives, devices, sharing, signals
from ..runtime.joining import open_together


def run(config: Evaluate, output: Output) -> None:
    """Write an evaluation row for each model and each completions file, with its curves, and print the table.

    Under torchrun the ranks share prompts, scores and log-probs; rank 0 writes.
    """
    evaluator = Evaluator(config, output)
    writer = RowWriter(output) if collectives.rank() == 0 else None
    subjects, shard = _subjects(config), evaluator.shard
    before = (writer.state.get("rows", []), writer.batches_done) if writer else None
    rows, done = collectives.from_rank_0(before)
    for subject in subjects[done:]:
        batch = evaluator.evaluate_file(subject.path) if subject.is_file else evaluator.evaluate_model(subject)
        rows += [{name: value for name, value in row.items() if name != PART} for row in batch]  # for the table
        stopping = collectives.any_rank(bool(signals.stop.signal))
        if writer:
            writer.write_batch(batch, state={"rows": rows})
        if stopping:
            raise sharing.stopped(f"{len(rows)} rows, which are kept")
    cost = {
        "peak_memory_bytes": devices.highest_memory_bytes(evaluator.compute.device),
        "device": evaluator.compute.name,
    }
    collectives.leave_ranks()
    if not writer:
        return
    counts = {"rows": len(rows)}
    skipped = evaluator.prompts.skipped if evaluator.prompts else {}
    writer.finish(of_evaluate(counts) | skipped, cost, shard.record(counts))
    if rows:  # a shard may have none
        tables.show_evaluations(rows)


class Subject(NamedTuple):
    """A model, with the beta of its values where it is given, or a completions file."""

    path: str
    is_file: bool = False
    ilql_beta: float | None = None


def _subjects(config: Evaluate) -> list[Subject]:
    """Everything that a shard evaluates: all models, at each beta, on its prompts, and its files."""
    models = () if config.sampled_by else config.model
    files = config.completions[_shard_of_files(config).batches]
    of_models = [Subject(path, ilql_beta=beta) for path in models for beta in config.ilql_beta or (None,)]
    return of_models + [Subject(path, is_file=True) for path in files]


def _shard_of_files(config: Evaluate) -> ShardRange:
    return shard_range(config.shard, slices(len(config.completions), 1))


def _shard_of_prompts(config: Evaluate, prompts: Rows) -> tuple[Rows, ShardRange]:
    """(the prompts of --shard, which are complete generation batches; that shard)."""
    batches = batch_slices(len(prompts.rows), config.n, config.generation_batch_size)
    shard = shard_range(config.shard, batches)
    mine = slice(shard.first, shard.first + shard.count)
    return replace(prompts, rows=prompts.rows[mine], lines=prompts.lines[mine]), shard


def _prompts(config: Evaluate) -> Rows | None:
    if not config.prompts:
        return None
    return load_rows(
        config.prompts, "prompts", skip_bad=config.skip_bad_rows, columns=config.columns, limit=config.limit
    )


class Evaluator:
    """Scorers, reference and prompts, opened once for all models and files. Raises InputError as the loaders do."""

    def __init__(self, config: Evaluate, output: Output):
        self.config = config
        silence_transformers()
        self.compute, output.resuming = open_together(config.device, config.dtype, output.resuming, config.rank_timeout)
        self.templates = template_options(config, output)
        self.prompts, self.shard = _prompts(config), _shard_of_files(config)
        if config.ilql_beta:
            for path in config.model:
                require_values(path, config.revision)
        self.samples: EngineSamples | None = None
        if self.prompts:
            self.prompts, self.shard = _shard_of_prompts(config, self.prompts)
            if self.prompts.rows and config.engine != "transformers":  # before a scorer takes the device's memory
                self.samples = EngineSamples(config, output, self.templates, self.prompts, config.model)
        scoring = scorer_options(config, self.compute, self.templates)
        self.scorer = load_scorer(config.scorer, scoring)
        self.reference = self._open_model(config.ref, config.ref_revision) if config.ref else None
        self.lm = NamedModel(config.lm, self._open_model(config.lm, config.lm_revision)) if config.lm else None
        self.policy: Loaded | None = None  # that sampled --completions
        self.selection_scorer: Scorer | None = None
        if config.selection_scorer:
            selecting = replace(scoring, revision=config.selection_scorer_revision, text="joined")
            self.selection_scorer = load_scorer(config.selection_scorer, selecting)

    def _open_model(self, path: str, revision: str | None) -> Loaded:
        return load_policy(
            path,
            Place(self.compute.device, self.compute.dtype),
            revision=revision,
            trust_remote_code=self.config.trust_remote_code,
            templates=self.templates,
        )

    def evaluate_model(self, subject: Subject) -> list[dict]:
        """The row of a model: completions of the prompts, scored, and the KL to the reference.

        With a beta both are those of the policy that is decoded with it.
        """
        config, prompts, reference, path = self.config, self.prompts, self.reference, subject.path
        assert prompts and reference and config.ref  # `Evaluate.check_model` requires them with --model
        if not prompts.rows:  # more shards than batches
            return []
        policy = self._open_model(path, config.revision)
        require_same_tokenizer(policy.tokenizer, reference.tokenizer, path, config.ref)
        if not self.samples:
            use_values(policy, path, config.revision, subject.ilql_beta)
        head = self._head(path, subject.ilql_beta)
        evaluation = PolicyEvaluation(self.scorer, config, config.seed, config.n, self.lm)
        against = Reference(reference.model)
        if self.samples:
            with self.compute.autocast():
                rows = compared(self.samples.rows_of(path), policy, config)
                metrics, completions = evaluation.measure_samples(
                    policy, against, rows, kl_temperature(config), f"{path} by --engine {config.engine}"
                )
        else:
            chosen = prompt_set(prompts, policy.codec, context_length(policy.model), config.max_prompt_length)
            name = path if subject.ilql_beta is None else f"{path} with beta {subject.ilql_beta:g}"
            shown = log.progress(f"evaluate {name}", len(chosen) * config.n, "completions")
            with shown as meter, self.compute.autocast():
                metrics, completions = evaluation.measure(policy, against, chosen, meter)
        return [head | metrics | (self._part(completions) if config.shard else {})]

    def _part(self, completions: list[dict]) -> dict[str, Any]:
        """What merging needs to know of a shard's completions beside their means."""
        tokens = sum(len(c["completion_ids"]) for c in completions)
        lm_tokens = tokens_of(self.lm.loaded, completions) if self.lm else 0
        texts = [completion_of(c) for c in completions]
        return {PART: part_of(texts, [c["prompt_id"] for c in completions], tokens, lm_tokens)}

    def evaluate_samples(self, path: str, policy_path: str) -> list[dict]:
        """The row of a policy from the samples of a completions file, and the rows of the file's curves."""
        config, reference = self.config, self.reference
        assert reference and config.ref  # `Evaluate.check_model` requires it with --model
        policy = self.policy = self.policy or self._open_model(policy_path, config.revision)
        require_same_tokenizer(policy.tokenizer, reference.tokenizer, policy_path, config.ref)
        read = load_rows(path, "completions", skip_bad=config.skip_bad_rows, columns=config.columns)
        samples = stored_samples(read, policy_path, policy, reference)
        beta = beta_of_samples(path, next(iter(config.ilql_beta), None))
        use_values(policy, policy_path, config.revision, beta)
        evaluation = PolicyEvaluation(self.scorer, config, config.seed, lm=self.lm)
        temperature = samples.temperature if samples.plain else None
        with self.compute.autocast():
            metrics, rows = evaluation.measure_samples(
                policy, Reference(reference.model), samples.rows, temperature, path
            )
        scores = [row["score"] for row in rows]
        skipped = {"skipped": samples.skipped} if samples.skipped else {}
        row = self._head(policy_path, beta) | metrics | {"temperature": samples.temperature, "completions": path}
        return [row | skipped, *self._curve_rows(path, samples.rows, scores, samples.temperature, row["scorer"])]

    def evaluate_file(self, path: str) -> list[dict]:
        """The row of a completions file, without a KL since its policy is unknown, and the rows of its curves."""
        config = self.config
        if config.sampled_by:
            return self.evaluate_samples(path, config.sampled_by)
        read = load_rows(path, "completions", skip_bad=config.skip_bad_rows, columns=config.columns)
        rows = read.rows
        scores = self.scorer.score(rows).values
        metrics = statistics(rows, [length_of(row) for row in rows], scores) | NO_KL
        with self.compute.autocast():
            if self.reference:
                metrics["perplexity_ref"] = perplexity(self.reference, rows, config.tokens_per_batch)
            if self.lm:
                metrics |= perplexity_of_lm(self.lm, rows, config.tokens_per_batch)
        temperatures = {r.get("temperature") for r in rows}
        temperature = temperatures.pop() if len(temperatures) == 1 else None
        skipped = {"skipped": read.skipped} if read.skipped else {}
        row = self._head(path) | metrics | {"temperature": temperature} | skipped
        return [row, *self._curve_rows(path, rows, scores, temperature, row["scorer"])]

    def _curve_rows(
        self, path: str, rows: list[dict], scores: list[float], temperature: float | None, scorer: str
    ) -> list[dict]:
        """The rows of a file's curves."""
        shared = {"model": path, "step": None, "temperature": temperature}
        return [shared | point | {"scorer": scorer} for point in self._curves(path, rows, scores, temperature)]

    def _curves(self, path: str, rows: list[dict], scores: list[float], temperature: float | None) -> list[dict]:
        """The points of the best-of-n curve and of the exact optimum, where they are asked for."""
        points: list[dict] = []
        if self.selection_scorer:
            selection = curves.by_prompt(rows, self.selection_scorer.score(rows).keys, path)
            best = curves.best_of_n(selection, curves.by_prompt(rows, scores, path))
            points += [{"method": "best-of-n"} | point for point in best]
        if self.config.optimum:
            _check_plain(path, rows, temperature, next(iter(self.config.ilql_beta), None))
            optimum = curves.optimum_curve(curves.by_prompt(rows, scores, path))
            points += [{"method": "optimum"} | point for point in optimum]
        return points

    def _head(self, path: str, ilql_beta: float | None = None) -> dict[str, Any]:
        """What identifies an evaluation row."""
        scorer = f"{self.scorer.name}@{self.scorer.score_type}"
        identity = _identity(path)
        if ilql_beta is not None:
            identity["options"] |= {"ilql_beta": ilql_beta}
        return identity | {"temperature": self.config.temperature, "scorer": scorer}


def _check_plain(path: str, rows: list[dict], temperature: float | None, ilql_beta: float | None) -> None:
    """Raises InputError for restricted or greedy samples, for which the importance weights do not hold."""
    why = not_plain(rows, sampling_manifest(path), temperature)
    if not why and beta_of_samples(path, ilql_beta):
        why = "they were decoded with --ilql-beta"
    if why:
        raise InputError(
            f"{path}: not plain samples of one model, so --optimum does not hold for them: {why}",
            hint="dpoctl sample --n 64 with --top-p 1 and --top-k 0 writes such a file",
        )


def _identity(path: str) -> dict[str, Any]:
    """Model, method, options and step of a run directory or file, from its manifest; without one only a name."""
    manifest = read_manifest(path)
    if manifest is None:
        return {"model": path, "method": "model", "options": {}, "step": None}
    options = manifest["options"]
    names = ("loss", "beta", "alpha", "target-kl", "kl-coef", "preset", "seed", "n", "best-of", "lr", "ilql-beta")
    kept = {k.replace("-", "_"): options[k] for k in names if options.get(k) is not None}
    stage = manifest["stage"]
    method = {
        "train-dpo": "dpo" if options.get("loss") == "sigmoid" else options.get("loss"),
        "sft": "preferred-ft" if options.get("field") else "sft",
        "train-ilql": "ilql",
        "sample": "sample",
    }.get(stage, stage)
    method = manifest["metrics"].get("method", method)
    return {"model": path, "method": method, "options": kept, "step": manifest["metrics"].get("step")}


def plan(config: Evaluate) -> dict[str, Any]:
    """What --dry-run prints."""
    prompts = _prompts(config)
    if prompts:
        prompts, _ = _shard_of_prompts(config, prompts)
    models = [] if config.sampled_by or (prompts and not prompts.rows) else list(config.model)
    files = [subject.path for subject in _subjects(config) if subject.is_file]
    shown: dict[str, Any] = {"models": json.dumps(models), "files": json.dumps(files)}
    shown |= {"sampled by": config.sampled_by} if config.sampled_by else {}
    if prompts:
        rows = len(models) * max(1, len(config.ilql_beta))
        shown |= {"completions": len(prompts.rows) * config.n * rows}
    shown |= engine_lines(config) if models else {}
    return shown | EvaluationPlan(config, prompts, models, files).memory_lines()
