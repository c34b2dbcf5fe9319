"""Training on single completions that are desirable or not: KTO (2402.01306), BCO (2404.04656), APO-zero."""

from dataclasses import replace

import torch
from torch import Tensor

from .. import log
from ..config.dpo import TrainDPO
from ..data.encode import PairData
from ..data.readers import Rows
from ..data.unpaired import encode_unpaired
from ..objectives.pair_logps import PairLogps
from ..objectives.preference import Objective
from ..objectives.unpaired import UNPAIRED_LOSSES
from ..runtime import collectives
from . import pairs
from .batch_statistics import Statistics
from .comparison import Compared, Dataset, only
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
        mismatches = self.objective.needs_batch_mean
        data = encode_unpaired(rows, self.codec, self.limits, self.config.threshold, mismatches=mismatches)
        n, prompts = sum(data.labels), len(data.prompts)
        log.say(f"{rows.path}: {n} desirable and {len(data.labels) - n} undesirable completions of {prompts} prompts")
        return data

    def with_reference(self, data: PairData, targets: Targets) -> Dataset:
        labelled = replace(targets, label=torch.tensor(data.labels, dtype=torch.float32))
        if data is self.data:
            warn_of_imbalance(self.config, labelled)
        dataset = super().with_reference(data, labelled)
        if not data.mismatched:
            return dataset
        others = replace(data, pairs=[(i, i) for i in data.mismatched])
        return replace(dataset, mismatched=replace(dataset, pairs=others))

    # --- an update

    @torch.no_grad()
    def statistics(self, batches: list[PairBatch], rows: list[int]) -> Statistics:
        """z of KTO, or the running means of BCO."""
        found = Statistics(float(len(rows)), 1.0)
        if self.objective.needs_batch_mean:
            found = replace(found, batch_mean=_mean(self._mismatched(self.train_set, rows), self.compute.device))
        if self.objective.needs_running_mean:
            self.running = self._running(self.compare_all(batches, self.train_set))
            found = replace(found, running_mean=self._threshold(self.running))
        return found

    def _mismatched(self, dataset: Dataset, rows: list[int]) -> list[tuple[list[int], Compared]]:
        """This rank's share of the rows' mismatched completions, under policy and reference."""
        others, tokens = dataset.mismatched, self.config.tokens_per_batch
        assert others is not None
        batches = pairs.micro_batches(others.pairs, rows, tokens, collectives.rank(), collectives.world_size())
        return self.compare_all(batches, others)

    def _running(self, compared: list[tuple[list[int], Compared]]) -> list[float]:
        """[sum of c, number] of desirable completions and of the others, over all updates and this batch."""
        total = torch.zeros(4, dtype=torch.float64, device=self.compute.device)
        for _, (p, given) in compared:
            weights = torch.ones_like(p.c) if given is None else given
            for i, kind in enumerate(_kinds(p)):
                mine = weights.where(kind, 0.0)
                total[2 * i] += (mine * p.c).double().sum()
                total[2 * i + 1] += mine.double().sum()
        known = self.state.get(RUNNING, [0.0] * 4)
        return [a + b for a, b in zip(known, collectives.sum_over_ranks(total).tolist(), strict=True)]

    def _threshold(self, running: list[float]) -> Tensor:
        """Half of each kind's mean; of one kind's alone while no completion of the other has come."""
        means = [total / n for total, n in (running[:2], running[2:]) if n > 0]
        return torch.full((), sum(means) / max(len(means), 1), device=self.compute.device)

    def commit(self) -> None:
        if self.running is not None:
            self.state[RUNNING] = self.running

    # --- around the updates

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        assert self.held_out is not None
        if self.objective.needs_batch_mean:
            self.held_out_mismatched = self._mismatched(self.held_out, list(range(len(self.held_out.pairs.pairs))))
        return super().evaluate()

    def held_out_statistics(self, compared: list[tuple[list[int], Compared]], rows: list[int]) -> Statistics:
        found = Statistics(float(len(rows)), 1.0)
        if self.objective.needs_batch_mean:
            of_rows = [only(*each, rows) for each in self.held_out_mismatched]
            found = replace(found, batch_mean=_mean(of_rows, self.compute.device))
        if self.objective.needs_running_mean:
            found = replace(found, running_mean=self._threshold(self.state.get(RUNNING, [0.0] * 4)))
        return found

    def logged(self, p: PairLogps, statistics: Statistics) -> Sums:
        """Sums and weights of what is logged, of both kinds apart; accuracy: c is on the label's side of z or delta."""
        n, (desirable, undesirable) = float(len(p.c)), _kinds(p)
        found: Sums = {}
        threshold = torch.zeros_like(p.c[0])
        if statistics.running_mean is not None:
            threshold = statistics.running_mean
            found["delta"] = (threshold.double() * n, n)
        elif statistics.batch_mean is not None:
            threshold = statistics.batch_mean.clamp(min=0.0)
            found["kl"] = (statistics.batch_mean.double() * n, n)
        right = torch.where(desirable, p.c > threshold, p.c < threshold)
        found["rewards/accuracies"] = (right.double().sum(), n)
        for side, kind in (("chosen", desirable), ("rejected", undesirable)):
            for name, values in (("rewards", self.config.beta * p.c), ("logps", p.chosen), ("length", p.chosen_tokens)):
                found[f"{name}/{side}"] = (values.detach().double().where(kind, 0.0).sum(), kind.sum())
        return found

    def on_log(self, row: dict[str, float]) -> None:
        if all(f"logps/{side}" in row for side in ("chosen", "rejected")):  # of both kinds some came
            self.monitor.check(row)


def warn_of_imbalance(config: TrainDPO, targets: Targets) -> None:
    """Warn where the two kinds of --data are unbalanced, with the option that would balance them.

    The weighted numbers should have a ratio of 1 to 4/3 (2402.01306, section 4.2). A kind of weight 0 is left out on
    purpose.
    """
    assert targets.label is not None
    weights = torch.ones_like(targets.label) if targets.weights is None else targets.weights
    factors = [1.0 if given is None else given for given in (config.lambda_chosen, config.lambda_rejected)]
    n, other = (f * float(weights[targets.label == kind].sum()) for f, kind in zip(factors, (1, 0), strict=True))
    if n and other and not 0.75 <= n / other <= 4 / 3:
        of_chosen, of_rejected = factors[0] * other / n, factors[1] * n / other
        option = f"--lambda-rejected {of_rejected:.3g}" if n > other else f"--lambda-chosen {of_chosen:.3g}"
        told = f"the two kinds are unbalanced (weighted {n / other:.2g} : 1); {option} would balance them"
        log.warn(f"{', '.join(config.data)}: {told}")


def _kinds(p: PairLogps) -> tuple[Tensor, Tensor]:
    """Which of the completions are desirable [P] bool, and which are not."""
    assert p.label is not None
    return p.label > 0.5, p.label <= 0.5


def _mean(compared: list[tuple[list[int], Compared]], device: torch.device) -> Tensor:
    """The mean log-ratio [], by the rows' weights, over all ranks."""
    total = torch.zeros(2, device=device)
    for _, (p, given) in compared:
        weights = torch.ones_like(p.c) if given is None else given
        total += torch.stack([(weights * p.c).sum(), weights.sum()])
    total = collectives.sum_over_ranks(total)
    return total[0] / total[1].clamp(min=1e-30)
