"""How a resolved command runs: as a plan, under torchrun, or in this process alone; and what `--json` prints of it."""

import io
import os
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from ..config.files import Merge
from ..config.sampling import Evaluate, Sharded
from ..config.shared import Common, Tabular
from ..config.training import Training
from ..outputs import manifests
from ..outputs.stdout import print_json
from ..runtime import determinism, pipes, rendezvous
from . import torchrun_group, torchrun_rows
from .claiming import inputs_of, run_claimed, stage


def run_stage(name: str, config: Any) -> int:
    """Run the command and return its exit code."""
    if not isinstance(config, Common):  # it writes nothing
        manifests.check_inputs(inputs_of(config))
        stage(name).run(config)
        return 0
    as_json = isinstance(config, Tabular) and config.json
    if rendezvous.world_size() > 1:  # before the ranks of a row command part
        for _, _, path in inputs_of(config):
            pipes.readable(path)
    if config.dry_run:
        _show_plan(name, config, as_json)
        return 0
    if not as_json:
        return _run(name, config)
    rank = rendezvous.rank()
    with redirect_stdout(io.StringIO()):  # the tables, whose numbers follow as JSON
        code = _run(name, config)
    if code == 0 and rank == 0:
        print_json(_result(config))
    return code


def _show_plan(name: str, config: Any, as_json: bool) -> None:
    """Print the plan: under torchrun on rank 0 alone, by default for as many devices as there are ranks."""
    rank, world = rendezvous.rank(), rendezvous.world_size()
    if rank:
        return
    if world > 1:
        os.environ.pop("WORLD_SIZE")  # nothing waits for the others, which join no process group
        if isinstance(config, Training) and config.plan_world_size is None:
            config = replace(config, plan_world_size=world)
    manifests.check_inputs(inputs_of(config))
    plan = stage(name).plan(config)
    if as_json:
        print_json(plan)
    else:
        print("\n".join(f"{key:<22} {value}" for key, value in plan.items()))


def _run(name: str, config: Any) -> int:
    determinism.ask(getattr(config, "deterministic", False))
    if rendezvous.world_size() > 1 and isinstance(config, Training | Evaluate):
        return torchrun_group.run(name, config)
    if rendezvous.world_size() > 1 and isinstance(config, Sharded):
        return torchrun_rows.run(name, config)
    if isinstance(config, Merge):
        if config.is_rows:  # claims its output as the command without --shard does
            stage(name).join_shards(config)
            return 0
        manifests.check_inputs(inputs_of(config))
        config = stage(name).with_base(config)
    return run_claimed(name, config)


def _result(config: Any) -> dict[str, Any]:
    """The numbers of a complete output: of evaluate its rows, of a report its tables, else the manifest's metrics."""
    from ..data.jsonl import read_jsonl
    from ..reports import collect, tables

    manifest = manifests.read_manifest(config.out)
    assert manifest is not None  # the command succeeded
    if manifest["stage"] == "report":
        return tables.numbers(collect.collect(config.inputs))
    if manifest["stage"] == "evaluate":
        return {"evaluations": [row for _, row in read_jsonl(config.out)]}
    return manifest["metrics"]
