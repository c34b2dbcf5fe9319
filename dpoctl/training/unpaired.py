"""Training on single completions that are desirable or not: KTO (2402.01306), BCO (2404.04656), APO-zero."""

from dataclasses import replace

import torch
from torch import Tensor

from .. import log
from ..data.encode import PairData
from ..data.readers import Rows
from ..data.unpaired import encode_unpaired, mismatched
from ..objectives.pair_logps import PairLogps
from ..objectives.preference import Objective
from ..objectives.unpaired import UNPAIRED_LOSSES
from ..runtime import collectives
from . import pairs, setup
from .batch_statistics import Statistics
from .comparison import Compared, Dataset
from .dpo import DPO
from .metrics import Sums
from .pairs import PairBatch
from .targets import Targets

RUNNING = "running_means"  # in the state: sum of c and number of completions, desirable and not, over all updates


class Unpaired(DPO):
    """A policy that learns from labels of single completions, each a pair with itself as far as batches go.

    KTO estimates the KL to the reference from each prompt with the completion of another row, as its paper does; which
    one is fixed, so that the reference's log-probs are computed once.
    """

    unit = "examples"
    rows_kind = "unpaired"

    def find_objective(self) -> Objective:
        return UNPAIRED_LOSSES[self.config.loss]

    def encode(self, rows: Rows) -> PairData:
        config = self.config
        data = encode_unpaired(rows, self.codec, setup.lengths(config, self.model), config.threshold)
        say_balance(rows.path, data, config.lambda_chosen or 1.0, config.lambda_rejected or 1.0)
        return data

    def with_reference(self, data: PairData, targets: Targets) -> Dataset:
        labelled = replace(targets, label=torch.tensor(data.labels, dtype=torch.float32))
        dataset = super().with_reference(data, labelled)
        if self.objective.needs_batch_mean:
            others = mismatched(data, setup.lengths(self.config, self.model))
            self.mismatches[id(data)] = super().with_reference(others, Targets(weights=targets.weights))
        return dataset

    # --- an update

    @torch.no_grad()
    def statistics(self, batches: list[PairBatch], rows: list[int]) -> Statistics:
        """z of KTO, or the running means of BCO."""
        found = Statistics(float(len(rows)), 1.0)
        if self.objective.needs_batch_mean:
            found = replace(found, batch_mean=self._divergence(self.train_set, rows))
        if self.objective.needs_running_mean:
            self.running = self._running(self.compare_all(batches, self.train_set))
            found = replace(found, running_mean=self._threshold(self.running))
        return found

    def _divergence(self, dataset: Dataset, rows: list[int]) -> Tensor:
        """The mean log-ratio [] of the rows' mismatched completions, over all ranks."""
        others, tokens = self.mismatches[id(dataset.pairs)], self.config.tokens_per_batch
        batches = pairs.micro_batches(others.pairs, rows, tokens, collectives.rank(), collectives.world_size())
        total = torch.zeros(2, device=self.compute.device)
        for mine, each in self.compare_all(batches, others):
            weights = torch.ones(len(mine), device=total.device) if each.weights is None else each.weights
            total += torch.stack([(weights * each.logps.c).sum(), weights.sum()])
        total = collectives.sum_over_ranks(total)
        return total[0] / total[1].clamp(min=1e-30)

    def _running(self, compared: list[tuple[list[int], Compared]]) -> list[float]:
        """[sum of c, number] of desirable completions and of the others, over all updates and this batch."""
        total = torch.zeros(4, dtype=torch.float64, device=self.compute.device)
        for _, each in compared:
            p = each.logps
            assert p.label is not None
            weights = torch.ones_like(p.c) if each.weights is None else each.weights
            for i, kind in enumerate((p.label > 0.5, p.label <= 0.5)):
                total[2 * i] += (weights * p.c)[kind].double().sum()
                total[2 * i + 1] += weights[kind].double().sum()
        known = self.state.get(RUNNING, [0.0] * 4)
        return [a + b for a, b in zip(known, collectives.sum_over_ranks(total).tolist(), strict=True)]

    def _threshold(self, running: list[float]) -> Tensor:
        """Half of each kind's mean; of one kind's alone while no completion of the other has come."""
        means = [total / n for total, n in (running[:2], running[2:]) if n > 0]
        return torch.tensor(sum(means) / max(len(means), 1), device=self.compute.device)

    def commit(self) -> None:
        if self.running is not None:
            self.state[RUNNING] = self.running

    # --- around the updates

    def held_out_statistics(self, compared: list[tuple[list[int], Compared]], rows: list[int]) -> Statistics:
        assert self.held_out is not None
        found = Statistics(float(len(rows)), 1.0)
        if self.objective.needs_batch_mean:
            found = replace(found, batch_mean=self._divergence(self.held_out, rows))
        if self.objective.needs_running_mean:
            found = replace(found, running_mean=self._threshold(self.state.get(RUNNING, [0.0] * 4)))
        return found

    def logged(self, p: PairLogps, statistics: Statistics) -> Sums:
        """Sums and weights of what is logged, of both kinds apart; accuracy: c is on the label's side of z or delta."""
        assert p.label is not None
        threshold = statistics.batch_mean if statistics.running_mean is None else statistics.running_mean
        z = 0.0 if threshold is None else threshold
        desirable = p.label > 0.5
        right = torch.where(desirable, p.c > z, p.c < z)
        found: Sums = {"rewards/accuracies": (right.double().sum(), float(len(p.c)))}
        if threshold is not None:
            found["kl" if statistics.running_mean is None else "delta"] = (
                threshold.double() * len(p.c),
                float(len(p.c)),
            )
        for side, kind in (("chosen", desirable), ("rejected", ~desirable)):
            n = float(kind.sum())
            for name, values in (("rewards", self.config.beta * p.c), ("logps", p.chosen), ("length", p.chosen_tokens)):
                found[f"{name}/{side}"] = (values.detach()[kind].double().sum(), n)
        return found

    def on_log(self, row: dict[str, float]) -> None:
        if all(f"logps/{side}" in row for side in ("chosen", "rejected")):  # of both kinds some came
            self.monitor.check(row)


def say_balance(path: str, data: PairData, desirable: float, undesirable: float) -> None:
    """Say how many completions are desirable, and where they are unbalanced which weights would balance them.

    The weighted numbers should have a ratio of 1 to 4/3 (2402.01306, section 4.2).
    """
    n = sum(data.labels)
    other = len(data.labels) - n
    log.say(f"{path}: {n} desirable and {other} undesirable completions of {len(data.prompts)} prompts")
    ratio = desirable * n / (undesirable * other)
    if not 0.75 <= ratio <= 4 / 3:
        weight = f"--lambda-rejected {n / other:.3g}" if n > other else f"--lambda-chosen {other / n:.3g}"
        log.warn(f"{path}: the two kinds are unbalanced (weighted {ratio:.2g} : 1); {weight} would balance them")
