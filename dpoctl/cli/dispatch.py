"""How a resolved command runs: as a plan, under torchrun, or in this process alone."""

from typing import Any

from ..config.files import Merge
from ..config.sampling import Sharded
from ..config.training import Training
from ..outputs import manifests
from ..outputs.stdout import print_json
from ..runtime import rendezvous
from . import torchrun_rows, torchrun_training
from .claiming import inputs_of, run_claimed, stage


def run_stage(name: str, config: Any) -> int:
    """Run the command and return its exit code."""
    if config.dry_run:
        manifests.check_inputs(inputs_of(config))
        plan = stage(name).plan(config)
        if getattr(config, "json", False):
            print_json(plan)
        else:
            print("\n".join(f"{key:<22} {value}" for key, value in plan.items()))
        return 0
    if rendezvous.world_size() > 1 and isinstance(config, Training):
        return torchrun_training.run(name, config)
    if rendezvous.world_size() > 1 and isinstance(config, Sharded):
        return torchrun_rows.run(name, config)
    if isinstance(config, Merge):
        if config.is_rows:  # claims its output as the command without --shard does
            stage(name).join_shards(config)
            return 0
        manifests.check_inputs(inputs_of(config))
        config = stage(name).with_base(config)
    return run_claimed(name, config)
