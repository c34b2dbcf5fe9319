"""Join the shards of a row output into one file, or merge an adapter into its base model.

A joined file has the manifest of the command without --shard: its stage, options and inputs. That command, and every
later one, finds it complete. Shards are concatenated byte for byte, those of evaluate pooled, without torch.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

from .. import log
from ..config.files import Merge
from ..data.jsonl import read_jsonl
from ..errors import InputError
from ..outputs import adapter_base, shard_totals
from ..outputs.claims import Output, Request, claim
from ..outputs.files import json_line, sha256_path, sync_directory
from ..outputs.manifests import read_manifest
from ..outputs.shards import Part, output_difference, read_parts


def run(config: Merge, output: Output) -> None:
    """Merge a policy's or reward model's adapter into its base; the result is an ordinary model directory."""
    from ..models.adapter import is_reward
    from ..models.ilql import copy_heads
    from ..models.load import load_merged, load_merged_reward
    from ..models.pretrained import quiet
    from ..models.save import save_model
    from ..runtime.devices import torch_dtype

    assert config.base is not None  # see with_base
    base = config.base
    load = load_merged_reward if is_reward(config.inputs[0]) else load_merged
    with quiet():
        model, tokenizer = load(config.inputs[0], base, config.revision, config.trust_remote_code)
        weights = sum(p.numel() for p in model.parameters())
        saved = save_model(model, tokenizer, output.out, torch_dtype(config.save_dtype))
        saved += copy_heads(Path(config.inputs[0]).expanduser(), output.out)  # merged layers have the same states
    output.finish([(path, None) for path in saved], {"parameters": weights}, {})
    log.say(f"{output.out}: {config.inputs[0]} merged into {base}, {weights:,} parameters")


def with_base(config: Merge) -> Merge:
    """The config with --base, by default the model that the adapter names. Raises InputError where it names none."""
    if config.base and Path(config.inputs[0]).expanduser().is_dir():
        return config
    found = adapter_base.find(config.inputs[0])
    return replace(config, base=found.path, revision=config.revision or found.revision)


# --- rows ------------------------------------------------------------------------------------------------------------


def join_shards(config: Merge) -> None:
    """`dpoctl merge SHARD.jsonl...`: check the shards, claim --out, join. Raises InputError as `read_parts` does."""
    parts = read_parts(config.inputs)
    if any(part.path.resolve() == Path(config.out).resolve() for part in parts):
        raise InputError(f"{config.out}: is also an input of this command", hint="choose another --out")
    first = parts[0].manifest
    request = Request(
        config.out,
        first["stage"],
        first["options"] | {"out": config.out, "shard": None},
        first["identity"] | {"shard": None},
        [(i["name"], "recorded", str(_input_path(parts[0], i))) for i in first["inputs"]],
        recorded=[_relative_to(Path(config.out).parent, parts[0], i) for i in first["inputs"]],
    )
    with claim(request, overwrite=config.overwrite) as output:
        if output.finished:
            log.say(f"{config.out}: complete already, nothing to do")
        else:
            _join(parts, output)


def join_ranks(paths: Sequence[str], output: Output) -> None:
    """Join the shards that torchrun's ranks wrote into the output claimed for all of them."""
    _join(read_parts(paths), output)


def unfinished(paths: Sequence[str], complete: str) -> list[str]:
    """Which shards are not complete yet, of the output to which the shard `complete` belongs.

    A shard of a different output, left there by an earlier run, counts as unfinished.
    """
    reference = read_manifest(complete) or {}
    manifests = {path: read_manifest(path) for path in paths}
    return [p for p, m in manifests.items() if m is None or "shard" not in m or output_difference(reference, m)]


def _input_path(part: Part, described: dict[str, Any]) -> Path:
    return part.path.parent / described["path"]


def _relative_to(folder: Path, part: Part, described: dict[str, Any]) -> dict[str, Any]:
    """An input as the joined file's manifest describes it: its path relative to `folder`."""
    if "size" not in described:  # a hub id
        return described
    return described | {"path": os.path.relpath(_input_path(part, described).resolve(), folder.resolve())}


def _join(parts: list[Part], output: Output) -> None:
    metrics = _judge_metrics(parts, output) if output.stage == "judge" else _metrics(parts)
    partial = output.out.with_name(output.out.name + ".partial")
    with open(partial, "wb") as joined:
        if output.stage == "evaluate":
            rows = _evaluations(parts)
            joined.write("".join(map(json_line, rows)).encode())
            count = metrics["rows"] = len(rows)
        else:
            _concatenate(parts, joined)
            count = _row_count(parts)
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(partial, output.out)
    sync_directory(output.folder)
    output.finish([(output.out, count)], metrics, _cost(parts))
    # An unfinished run without --shard may have left its progress here.
    output.out.with_name(output.out.name + ".progress").unlink(missing_ok=True)
    log.say(f"{output.out}: {count} rows from {len(parts)} shards")
    _show(output, metrics, parts)


def _evaluations(parts: list[Part]) -> list[dict[str, Any]]:
    """The evaluation rows of all prompts, from those of each shard's prompts."""
    from ..inference.evaluation_shards import merged

    return merged([[row for _, row in read_jsonl(part.path)] for part in parts])


def _concatenate(parts: list[Part], joined: BinaryIO) -> None:
    for part in parts:
        with open(part.path, "rb") as rows:
            shutil.copyfileobj(rows, joined)


def _row_count(parts: list[Part]) -> int:
    return sum(part.manifest["outputs"][part.output]["rows"] for part in parts)


def _metrics(parts: list[Part]) -> dict[str, Any]:
    """The metrics of the joined file, from the sums of the shards' counts.

    Metrics without counts (rows skipped) are the same in every shard.
    """
    first = parts[0].manifest
    metrics = shard_totals.METRICS[first["stage"]](reduce(shard_totals.add, (part.shard["counts"] for part in parts)))
    return first["metrics"] | metrics  # a first shard without rows knows no groups


_NAMES = ("candidates", "baseline")  # among the metrics of a tournament


def _judge_metrics(parts: list[Part], output: Output) -> dict[str, Any]:
    """The summary over all rows, with --compare and --against evaluated on all rows."""
    from ..judging.check_results import metrics_of_check
    from ..judging.results import compared, metrics_with

    rows = [row for part in parts for _, row in read_jsonl(part.path)]
    counts_of_all = {k: v for k, v in parts[0].manifest["metrics"].items() if isinstance(v, int)}
    if output.options.get("check"):
        return counts_of_all | metrics_of_check(rows, output.options["backend"], output.options["seed"])
    files: dict[str, str] = {}
    for described in parts[0].manifest["inputs"]:
        if described["name"] in ("compare", "against"):
            path = files[described["name"]] = str(_input_path(parts[0], described))
            if os.path.exists(path) and sha256_path(path) != described["sha256"]:
                raise InputError(f"{path}: --{described['name']} has changed since the shards were judged")
    counts = counts_of_all | {name: value for name, value in parts[0].manifest["metrics"].items() if name in _NAMES}
    return compared(metrics_with(counts, rows), rows, output.options | files)


def _cost(parts: list[Part]) -> dict[str, Any]:
    """The cost of all shards: seconds, tokens, FLOPs and dollars are summed; peak memory is the maximum."""
    every = [part.manifest["cost"] for part in parts]
    total: dict[str, Any] = {"started": min(c["started"] for c in every), "finished": max(c["finished"] for c in every)}
    for name in dict.fromkeys(name for cost in every for name in cost if name not in total):
        values = [cost[name] for cost in every if name in cost]
        if isinstance(values[0], str):
            total[name] = ", ".join(dict.fromkeys(values))
        else:
            total[name] = max(values) if name == "peak_memory_bytes" else round(sum(values), 6)
    return total


def _show(output: Output, metrics: dict[str, Any], parts: list[Part]) -> None:
    """The table with which the stage itself ends."""
    if output.stage == "judge":
        from ..reports import judgements

        judgements.show(output.options, str(output.out), metrics)
    elif output.stage == "evaluate":
        from ..reports import tables

        tables.show_evaluations([row for _, row in read_jsonl(output.out)])
    elif output.stage == "score" and "pairs" in metrics:
        from ..reports.accuracies import say_scores

        say_scores(str(output.out), metrics, output.options.get("by"))  # absent in older versions
    elif output.stage == "make-prefs" and parts[0].output == 0:  # not the samples of --completions-out
        from ..reports.preferences import say_preferences

        counts = reduce(shard_totals.add, (part.shard["counts"] for part in parts))
        say_preferences(str(output.out), metrics, f"{len(parts)} shards", counts.get("score_types", {}))


def plan(config: Merge) -> dict[str, Any]:
    """What --dry-run shows."""
    if not config.is_rows:
        return {"adapter": config.inputs[0], "base": with_base(config).base}
    parts = read_parts(config.inputs)
    stage = parts[0].manifest["stage"]
    rows = len(_evaluations(parts)) if stage == "evaluate" else _row_count(parts)
    return {"shards": len(parts), "stage": stage, "rows": rows}
