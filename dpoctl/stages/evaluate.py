"""Reward, sequence KL to the reference, lengths and fluency of models, or of completions files, on unseen prompts."""

import json

from .. import log
from ..config.sampling import Evaluate
from ..data.schema import Rows, load_rows
from ..errors import InputError
from ..inference import curves as curve
from ..inference import policy_evaluation
from ..inference.scorers import Scorer, load_scorer
from ..models.load import context_length
from ..outputs.claims import Output
from ..outputs.manifests import read_manifest
from ..outputs.row_writer import RowWriter
from ..outputs.shard_totals import of_evaluate
from ..outputs.shards import cut, share_of
from ..reports import tables
from ..runtime import devices
from ..training import setup


def run(config: Evaluate, output: Output) -> None:
    device, dtype = setup.open_device(config)
    prompts = _prompts(config)
    scorer = load_scorer(config.scorer, device=str(device), revision=config.revision, text=config.score_text)
    reference = setup.open_model(config, config.ref, device) if config.ref else None
    lm = (*setup.open_model(config, config.lm, device), config.lm) if config.lm else None
    writer = RowWriter(output)
    subjects = _subjects(config)
    share = share_of(config.shard, cut(len(subjects), 1))
    rows = writer.state.get("rows", [])
    selection_scorer = (
        load_scorer(config.selection_scorer, device=str(device), revision=config.revision)
        if config.selection_scorer
        else None
    )
    for path, is_file in subjects[share.batches][writer.batches_done :]:
        further: list[dict] = []
        with devices.autocast(device, dtype):
            if is_file:
                metrics, further = _completions_metrics(config, path, scorer, selection_scorer, reference, lm)
            else:
                metrics = _model_metrics(config, path, prompts, scorer, reference, lm, device)
        row = _who(path) | {"temperature": config.temperature, "scorer": f"{scorer.name}@{scorer.score_type}"} | metrics
        batch = [row, *(row_of_curve | {"scorer": row["scorer"]} for row_of_curve in further)]
        rows = [*rows, *batch]
        writer.write_batch(batch, state={"rows": rows})
    cost = {"peak_memory_bytes": devices.peak_memory_bytes(device), "device": devices.device_name(device)}
    counts = {"rows": len(rows)}
    writer.finish(of_evaluate(counts) | (prompts.skipped if prompts else {}), cost, share.record(counts))
    if rows:  # a shard may have none
        tables.show_evaluations(rows)


def _subjects(config: Evaluate) -> list[tuple[str, bool]]:
    """(path, is it a completions file) of everything that is evaluated, models first."""
    return [(path, False) for path in config.model] + [(path, True) for path in config.completions]


def _prompts(config: Evaluate) -> Rows | None:
    return (
        load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows, limit=config.limit)
        if config.prompts
        else None
    )


def _model_metrics(config, path, prompts, scorer: Scorer, reference, lm, device) -> dict:
    model, tokenizer = setup.open_model(config, path, device)
    ids = policy_evaluation.prompt_ids(prompts.rows, tokenizer, context_length(model), prompts.path, prompts.lines)
    setup.same_tokenizer(tokenizer, reference[1], path, config.ref)
    with log.progress(f"evaluate {path}", len(ids) * config.n, "completions") as meter:
        metrics, _ = policy_evaluation.evaluate_policy(
            model,
            reference[0],
            tokenizer,
            prompts.rows,
            ids,
            scorer,
            config,
            n=config.n,
            seed=config.seed,
            lm=lm,
            meter=meter,
        )
    return metrics


def _completions_metrics(config, path, scorer: Scorer, selection_scorer, reference, lm) -> tuple[dict, list[dict]]:
    """(figures of a completions file, rows of its curves); its policy is not at hand: no KL."""
    read = load_rows(path, "completions", skip_bad=config.skip_bad_rows)
    rows = read.rows
    scores = scorer.score(rows).values
    lengths = [len(r.get("completion_ids") or r["completion"].split()) + (r.get("finish") == "stop") for r in rows]
    metrics = policy_evaluation.statistics(rows, lengths, scores) | {
        "kl": None,
        "kl_se": None,
        "kl_exact": None,
        "kl_exact_se": None,
    }
    if reference:
        under = policy_evaluation.perplexity_under(*reference, config.ref, rows, config.tokens_per_batch)
        metrics["perplexity_ref"] = under["perplexity_lm"]
    if lm:
        metrics |= policy_evaluation.perplexity_under(*lm, rows, config.tokens_per_batch)
    temperatures = {r.get("temperature") for r in rows}
    temperature = temperatures.pop() if len(temperatures) == 1 else None
    curves = []
    if selection_scorer:
        chosen = curve.by_prompt(rows, selection_scorer.score(rows).keys, path)
        curves += [{"method": "best-of-n"} | r for r in curve.best_of_n(chosen, curve.by_prompt(rows, scores, path))]
    if config.optimum:
        _check_plain(path, temperature)
        curves += [{"method": "optimum"} | r for r in curve.optimum_curve(curve.by_prompt(rows, scores, path))]
    curves = [{"model": path, "step": None, "temperature": temperature} | row for row in curves]
    skipped = {"skipped": read.skipped} if read.skipped else {}
    return metrics | {"temperature": temperature} | skipped, curves


def _check_plain(path: str, temperature: float | None) -> None:
    """The importance weights hold for samples of the reference itself: refuse cut or greedy ones."""
    options = (read_manifest(path) or {"options": {}})["options"]
    cut = options.get("top-p", 1.0) < 1 or options.get("top-k", 0) > 0 or options.get("best-of")
    if cut or temperature == 0:
        raise InputError(
            f"{path}: not plain samples of one model, so --optimum does not hold for them",
            hint="dpoctl sample --n 64 with --top-p 1 and --top-k 0 writes such a file",
        )


def _who(path: str) -> dict:
    """Model, method, options and step of a run directory or file, from its manifest; a plain model has only a name."""
    manifest = read_manifest(path)
    if manifest is None:
        return {"model": path, "method": "model", "options": {}, "step": None}
    options = manifest["options"]
    names = ("loss", "beta", "alpha", "target-kl", "kl-coef", "preset", "seed", "n", "best-of", "lr")
    kept = {k.replace("-", "_"): options[k] for k in names if options.get(k) is not None}
    stage = manifest["stage"]
    method = {
        "train-dpo": "dpo" if options.get("loss") == "sigmoid" else options.get("loss"),
        "sft": "preferred-ft" if options.get("field") else "sft",
        "sample": "sample",
    }.get(stage, stage)
    method = manifest["metrics"].get("method", method)
    return {"model": path, "method": method, "options": kept, "step": manifest["metrics"].get("step")}


def plan(config: Evaluate) -> dict:
    prompts = _prompts(config)
    subjects = _subjects(config)
    mine = subjects[share_of(config.shard, cut(len(subjects), 1)).batches]
    models, files = ([path for path, is_file in mine if is_file is kind] for kind in (False, True))
    shown = {"models": json.dumps(models), "files": json.dumps(files)}
    return shown | ({"completions": len(prompts.rows) * config.n * len(models)} if prompts else {})
