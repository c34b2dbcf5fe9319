"""Align a policy with preferences by DPO or one of its relatives (2305.18290, section 4)."""

from typing import Any

import torch

from ..config.dpo import TrainDPO
from ..data.encode import Limits, PairData
from ..data.readers import Rows
from ..data.unpaired import encode_unpaired
from ..inference.memory import Held
from ..models.logprobs import Sequences, summed_logps
from ..objectives.catalogue import traits_of
from ..outputs.claims import Output
from ..training import loop
from ..training.dpo import DPO
from ..training.plan import PairsPlan, is_sharded
from ..training.setup import codec_of
from ..training.targets import check_score_type, targets_of
from ..training.unpaired import Unpaired


def run(config: TrainDPO, output: Output) -> None:
    """Train and save the run directory."""
    loop.train((Unpaired if config.is_unpaired else DPO)(config, output))


def plan(config: TrainDPO) -> dict:
    """What --dry-run prints."""
    return Plan(config).lines()


class Plan(PairsPlan):
    """The reference's log-probs, updates, and points of the frontier."""

    def __init__(self, config: TrainDPO):
        if config.is_unpaired:
            self.kind_of_rows, self.unit = "unpaired", "examples"
        super().__init__(config, config.shuffle)

    def encode(self, config: TrainDPO, rows: Rows, limits: Limits) -> PairData:
        if config.is_unpaired:
            mismatches = traits_of(config.loss).needs_batch_mean
            data = encode_unpaired(rows, codec_of(config), limits, config.threshold, mismatches=mismatches)
        else:
            data = super().encode(config, rows, limits)
        check_score_type(config, config.data, [data])
        targets_of(config, rows, data)  # refuses what a run refuses
        return data

    def loss(self, model: Any, sequences: Sequences) -> torch.Tensor:
        return summed_logps(model, sequences).sum()

    def reference_of(self, config: TrainDPO) -> tuple[str, str | None] | None:
        cached = traits_of(config.loss).needs_reference and not config.sync_ref_every
        return config.reference if cached else None

    def held_beside(self, config: TrainDPO, trained: Held) -> dict[str, int]:
        if not config.sync_ref_every:
            return {}
        world = (config.plan_world_size or 1) if is_sharded(config) else 1
        return {"moving reference": -(-trained.size // world)}  # of the same shapes, in float32 too
