"""Join the shards of a row work into the file of the whole, or an adapter and its base into one model.

A joined file is the whole work's own: its stage, options and inputs are those of the command without --shard, which takes
it for complete, as every later command does. Shards are joined byte by byte, without torch.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from .. import log
from ..config.files import Merge
from ..data.jsonl import read_jsonl
from ..errors import InputError
from ..models.hub import base_of
from ..outputs import shard_totals
from ..outputs.claims import Output, claim
from ..outputs.files import sha256_path, sync_directory
from ..outputs.manifests import read_manifest
from ..outputs.shards import Part, different_work, read_parts


def run(config: Merge, output: Output) -> None:
    """An adapter, of a policy or of train-rm's, and its base: one ordinary model directory."""
    from ..models.adapter import is_reward
    from ..models.load import load_merged, load_merged_reward
    from ..models.pretrained import quiet
    from ..models.save import save_model
    from ..runtime.devices import torch_dtype

    load = load_merged_reward if is_reward(config.inputs[0]) else load_merged
    with quiet():
        model, tokenizer = load(config.inputs[0], config.base, config.revision, config.trust_remote_code)
        weights = sum(p.numel() for p in model.parameters())
        saved = save_model(model, tokenizer, output.out, torch_dtype(config.save_dtype))
    output.finish([(path, None) for path in saved], {"parameters": weights}, {})
    log.say(f"{output.out}: {config.inputs[0]} merged into {config.base}, {weights:,} parameters")


def with_base(config: Merge) -> Merge:
    """The config with the base that the adapter names, where --base is not given. Raises InputError where none is."""
    return config if config.base else replace(config, base=base_of(config.inputs[0]))


# --- rows ------------------------------------------------------------------------------------------------------------


def join_shards(config: Merge) -> None:
    """`dpoctl merge SHARD.jsonl...`: check the shards, claim the whole's file, join. Raises InputError as read_parts does."""
    parts = read_parts(config.inputs)
    if any(part.path.resolve() == Path(config.out).resolve() for part in parts):
        raise InputError(f"{config.out}: is an input of this command too", hint="choose another --out")
    first = parts[0].manifest
    options = first["options"] | {"out": config.out, "shard": None}
    whole = claim(
        config.out,
        first["stage"],
        options,
        first["identity"] | {"shard": None},
        [(i["name"], "recorded", str(_input_path(parts[0], i))) for i in first["inputs"]],
        overwrite=config.overwrite,
        recorded=[_seen_from(Path(config.out).parent, parts[0], i) for i in first["inputs"]],
    )
    with whole as output:
        if output.finished:
            log.say(f"{config.out}: complete already, nothing to do")
        else:
            _join(parts, output)


def join_ranks(paths: Sequence[str], output: Output) -> None:
    """The shards that torchrun's ranks wrote, into the claimed output of them all."""
    _join(read_parts(paths), output)


def unfinished(paths: Sequence[str], own: str) -> list[str]:
    """Which shards are not complete yet as parts of the work that the shard `own` is of.

    A shard that an earlier run of another work left there does not count; one of the same work has the same bytes.
    """
    mine, found = read_manifest(own), [(path, read_manifest(path)) for path in paths]
    return [path for path, manifest in found if "shard" not in (manifest or {}) or different_work(mine, manifest)]


def _input_path(part: Part, described: dict[str, Any]) -> Path:
    return part.path.parent / described["path"]


def _seen_from(folder: Path, part: Part, described: dict[str, Any]) -> dict[str, Any]:
    """An input as the whole's manifest describes it: paths are relative to the manifest; a hub id, without size, stays."""
    if "size" not in described:
        return described
    return described | {"path": os.path.relpath(_input_path(part, described).resolve(), folder.resolve())}


def _join(parts: list[Part], output: Output) -> None:
    metrics = _judge_metrics(parts, output) if output.stage == "judge" else _metrics(parts)
    partial = output.out.with_name(output.out.name + ".partial")
    with open(partial, "wb") as whole:
        for part in parts:
            with open(part.path, "rb") as rows:
                shutil.copyfileobj(rows, whole)
        whole.flush()
        os.fsync(whole.fileno())
    os.replace(partial, output.out)
    sync_directory(output.folder)
    rows = sum(part.manifest["outputs"][part.output]["rows"] for part in parts)
    output.finish([(output.out, rows)], metrics, _cost(parts))
    output.out.with_name(output.out.name + ".progress").unlink(
        missing_ok=True
    )  # of a run without shards, once begun here
    log.say(f"{output.out}: {rows} rows of {len(parts)} shards")
    _show(output, metrics)


def _metrics(parts: list[Part]) -> dict[str, Any]:
    """The figures of the whole, from counts that add up; what no count gives is every shard's alike (rows skipped)."""
    first = parts[0].manifest
    metrics = shard_totals.METRICS[first["stage"]](reduce(shard_totals.add, (part.shard["counts"] for part in parts)))
    return {name: metrics.get(name, value) for name, value in first["metrics"].items()}


def _judge_metrics(parts: list[Part], output: Output) -> dict[str, Any]:
    """The summary over all rows, and what --compare and --against say of the whole."""
    from ..judging.results import compared
    from ..judging.summary import metrics_of

    rows = [row for part in parts for _, row in read_jsonl(part.path)]
    beside = {}
    for described in parts[0].manifest["inputs"]:
        if described["name"] in ("compare", "against"):
            path = beside[described["name"]] = str(_input_path(parts[0], described))
            if os.path.exists(path) and sha256_path(path) != described["sha256"]:
                raise InputError(f"{path}: not what --{described['name']} was when the shards were judged")
    counts_of_all = {k: v for k, v in parts[0].manifest["metrics"].items() if isinstance(v, int)}
    return counts_of_all | compared(metrics_of(rows), rows, output.options | beside)


def _cost(parts: list[Part]) -> dict[str, Any]:
    """What all shards cost together: seconds, tokens, FLOPs and dollars add up, the peak memory is the largest."""
    every = [part.manifest["cost"] for part in parts]
    total: dict[str, Any] = {"started": min(c["started"] for c in every), "finished": max(c["finished"] for c in every)}
    for name in dict.fromkeys(name for cost in every for name in cost if name not in total):
        values = [cost[name] for cost in every if name in cost]
        if isinstance(values[0], str):
            total[name] = ", ".join(dict.fromkeys(values))
        else:
            total[name] = max(values) if name == "peak_memory_bytes" else round(sum(values), 6)
    return total


def _show(output: Output, metrics: dict[str, Any]) -> None:
    """The table with which the stage itself ends."""
    if output.stage == "judge":
        from ..reports import judgements

        judgements.show(output.options, str(output.out), metrics)
    elif output.stage == "evaluate":
        from ..reports import tables

        tables.show_evaluations([row for _, row in read_jsonl(output.out)])


def plan(config: Merge) -> dict[str, Any]:
    if not config.is_rows:
        return {"adapter": config.inputs[0], "base": with_base(config).base}
    parts = read_parts(config.inputs)
    rows = sum(part.manifest["outputs"][part.output]["rows"] for part in parts)
    return {"shards": len(parts), "stage": parts[0].manifest["stage"], "rows": rows}
