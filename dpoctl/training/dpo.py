"""Direct preference optimization and its relatives: reference log-probs once, then updates on pairs (2305.18290)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import log
from ..config.dpo import VOTES, TrainDPO
from ..data.encode import PairData, encode_pairs
from ..data.readers import Rows
from ..errors import NumericalError
from ..models.logprobs import Sequences
from ..models.tokenizers import require_same_tokenizer
from ..objectives.pair_logps import PairLogps
from ..objectives.preference import Objective, objective_of
from ..outputs.claims import Output
from ..runtime import collectives, fsdp
from ..runtime.fsdp_root import is_sharded
from . import batch_statistics, pairs, setup, start_check
from . import held_out as held_out_files
from .batch_statistics import Statistics
from .comparison import Compared, Comparison, Dataset, only, prefixes_of
from .displacement import LogRatioMonitor
from .frontier import FrontierEvaluation
from .metrics import Meter, Sums
from .moving_reference import MovingReference
from .pair_task import PairTask
from .pairs import PairBatch
from .reference_cache import ReferenceCache
from .targets import Targets, check_score_type, targets_of

_SELECTED = {"loss": "loss", "accuracy": "rewards/accuracies", "reward": "reward"}
_LARGEST_START = 1e-2  # float32's rounding of a sum over a response


class Micro(NamedTuple):
    """Pairs forwarded together, and what their losses read of the other pairs of the batch."""

    batch: PairBatch
    statistics: Statistics


class DPO(PairTask):
    """A policy that learns from pairs by the objective of --loss, relative to its reference."""

    config: TrainDPO
    rows_kind = "preferences"
    next_command = "dpoctl evaluate --model {out} --ref {ref} --prompts PROMPTS.jsonl --out eval.jsonl"

    def __init__(self, config: TrainDPO, output: Output):
        super().__init__(config, output)
        self.ref = config.ref or config.model
        self.objective = self.find_objective()
        given = {name: getattr(config, name) for name in self.objective.options}
        self.loss_options = {name: value for name, value in given.items() if value is not None}
        self.limits = setup.lengths(config, self.model)
        rows, held_out_rows = held_out_files.load_rows(config, self.rows_kind)
        held_out_files.warn_of_shared(rows, held_out_rows)
        self.data = self.encode(rows)
        self.trains_chats = self.data.counts["chats"] > 0
        held_out = self.encode(held_out_rows) if held_out_rows else None
        check_score_type(config, (*config.data, *config.eval_data), [self.data, *([held_out] if held_out else [])])
        targets = targets_of(config, rows, self.data)
        held_out_targets = targets_of(config, held_out_rows, held_out) if held_out_rows and held_out else Targets()
        self.running: Any = None  # running means with the update under way
        self.moving = self._open_moving() if config.sync_ref_every else None
        self.comparison = Comparison(config, self.model, self.moving, self.compute.device)
        self.train_set = self.with_reference(self.data, targets)
        self.stream = pairs.pair_stream(self.data, config, config.shuffle)
        self.held_out = self.with_reference(held_out, held_out_targets) if held_out else None
        self.has_held_out = held_out is not None
        self.select, self.patience = _SELECTED[config.select_by] if config.select == "best" else "", config.patience
        self.most_kl = config.select_kl
        self._check_start()
        self.parts = held_out_files.parts_of(held_out.lines, config.eval_data) if held_out else {}
        self.extra_metrics = dict(self.data.counts) | held_out_files.counts_of(rows)
        self.monitor = LogRatioMonitor(config.loss, config.beta, self.objective)
        if config.eval_prompts:
            trained_on = {tuple(p) for p in self.data.prompts}
            self.frontier = FrontierEvaluation(config, self, method_name(config), trained_on)

    def find_objective(self) -> Objective:
        return objective_of(self.config.loss)

    def encode(self, rows: Rows) -> PairData:
        data = encode_pairs(rows, self.codec, self.limits)
        size = f"{len(data.pairs)} pairs over {len(data.completions)} completions of {len(data.prompts)} prompts"
        log.say(f"{rows.path}: {size}")
        return data

    def _open_moving(self) -> MovingReference:
        """The reference in memory, where it moves; sharded as the policy is."""
        path, revision = self.config.reference
        model, tokenizer, _ = setup.open_in_float32(self.config, self.compute, path, revision, self.templates)
        require_same_tokenizer(self.tokenizer, tokenizer, self.config.model, self.ref)
        setup.shard_model(self.config, model, self.compute)
        return MovingReference(model, self.model, self.config.sync_ref_mix, path)

    @property
    def further_tensors(self) -> dict[str, Tensor]:
        return self.moving.tensors if self.moving else {}

    def with_reference(self, data: PairData, targets: Targets) -> Dataset:
        """The data with the reference's log-probs; zeros for an objective without a reference."""
        config, sequences = self.config, pairs.sequences(data)
        if self.moving:
            return Dataset(data, sequences, targets)
        if not self.objective.needs_reference:
            return Dataset(data, sequences, targets, torch.zeros(len(sequences)))
        prefixes, cut = prefixes_of(data, sequences) if config.ld_alpha is not None else ({}, [])
        key: dict[str, Any] = {
            "weights": setup.content_of(*config.reference),
            "tokenizer": self.codec.fingerprint,
            "dtype": str(self.compute.dtype),
            "device": self.compute.device.type,
            "format": 2,  # 1: wrong for models whose windows a packed row ignored
        }
        if config.quantize:
            key["quantize"] = config.quantize
        if is_sharded(self.model) and self.compute.dtype != torch.float32:
            key["sharded"] = True  # FSDP rounds the hidden states between blocks to the precision
        cache = ReferenceCache(config.cache_dir, key, config.tokens_per_batch)
        found = cache.logps(self._load_reference, [*sequences, *cut], self.compute)
        return Dataset(data, sequences, targets, found, prefixes)

    def _load_reference(self) -> Any:
        if self.ref == self.config.model:
            return self.model  # not trained yet: the same weights
        reference, tokenizer, _ = self.open_model(*self.config.reference)
        require_same_tokenizer(self.tokenizer, tokenizer, self.config.model, self.ref)
        setup.shard_model(self.config, reference, self.compute)
        return reference

    # --- an update

    def step(self, step: int, trainer: Any) -> float:
        loss = super().step(step, trainer)
        self.commit()
        every = self.config.sync_ref_every
        if self.moving and every and (step + 1) % every == 0:
            self.moving.move(self.model)
        return loss

    def commit(self) -> None:
        """Keep the running means of an update that is done: a rerun of the update begins with those before it."""
        if self.running is not None:
            self.state[batch_statistics.RUNNING] = self.running

    def micro_batches(self, step: int) -> list[Micro]:
        batches, rows = self.pair_batches(step), self.stream.batch(step)
        statistics = self.statistics(batches, rows)
        return [Micro(batch, statistics) for batch in batches]

    @torch.no_grad()
    def statistics(self, batches: list[PairBatch], rows: list[int]) -> Statistics:
        """What the losses of an update read of the whole batch; one more pass where it takes the policy."""
        compared: list[tuple[list[int], Compared]] = []
        if batch_statistics.needs_pass(self.objective):
            compared = self.compare_all(batches, self.train_set)
        found = batch_statistics.of_batch(self.objective, compared, rows, self.train_set, self.compute.device)
        if self.objective.needs_running_mean:
            self.running = batch_statistics.running(self.state, found.batch_mean, found.weight)
            found = found.with_running_mean(self.running)
        return found

    def compare_all(self, batches: list[PairBatch], dataset: Dataset) -> list[tuple[list[int], Compared]]:
        """The rows of each micro-batch, and its pairs under policy and reference."""
        with self.compute.autocast():
            in_lockstep = fsdp.in_lockstep(self.model, batches, self.dummy_loss)
            return [(batch.rows, self.comparison.compare(batch, dataset)) for batch in in_lockstep]

    def loss(self, micro: Micro) -> tuple[Tensor, Sums]:
        batch, n = micro.batch, micro.batch.n_global
        routed = self.balance.watch(pairs.counts(batch))
        compared = self.comparison.compare(batch, self.train_set, routed)
        losses = self._losses(compared, micro.statistics, batch.rows)
        balance, logged = self.balance.loss(routed, len(batch.pairs) / n)
        return losses.sum() / n + balance, self.logged(compared.logps, micro.statistics) | logged

    def logged(self, p: PairLogps, statistics: Statistics) -> Sums:
        """Sums and weights of what is logged of a micro-batch."""
        return _sums(p, self.config.beta)

    def _losses(self, compared: Compared, statistics: Statistics, rows: list[int]) -> Tensor:
        """[P]: the loss of each of a micro-batch's pairs, times its weight."""
        logps = statistics.added_to(compared.logps, rows)
        losses = self.objective.loss(logps, self.config.beta, **self.loss_options)
        return losses if compared.weights is None else losses * compared.weights

    def texts(self, micro: Micro) -> tuple[Sequences, list[float]]:
        sequences = [self.train_set.sequences[i] for i in micro.batch.completions]
        return sequences, pairs.counts(micro.batch)

    def dummy_loss(self) -> Tensor:
        return self.comparison.dummy()

    def tokens(self, micro: Micro) -> int:
        return pairs.batch_tokens(self.data, micro.batch)

    # --- around the updates

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The logged metrics and the loss over all held-out pairs, and with `NAME/` before them over each file's."""
        assert self.held_out is not None
        data = self.held_out.pairs
        every, rank, world = list(range(len(data.pairs))), collectives.rank(), collectives.world_size()
        batches = pairs.micro_batches(data, every, self.config.tokens_per_batch, rank, world)
        compared = self.compare_all(batches, self.held_out)
        metrics = self._held_out_metrics(compared, every)
        for name, members in self.parts.items():
            if members:
                of_part = self._held_out_metrics([only(*each, members) for each in compared], members)
                metrics |= {f"{name}/{key}": value for key, value in of_part.items()}
        return metrics

    def _held_out_metrics(self, compared: list[tuple[list[int], Compared]], rows: list[int]) -> dict[str, float]:
        """The metrics of held-out pairs, `rows` those of all ranks, which are one batch."""
        assert self.held_out is not None
        data, meter = self.held_out, Meter()
        compared = [(mine, each) for mine, each in compared if mine]
        found = self.held_out_statistics(compared, rows)
        for mine, each in compared:
            losses, weights = self._losses(each, found, mine), data.targets.weights
            meter.add("loss", losses.double().sum(), float(len(mine) if weights is None else weights[mine].sum()))
            meter.add_all(self.logged(each.logps, found))
        return meter.take()

    def held_out_statistics(self, compared: list[tuple[list[int], Compared]], rows: list[int]) -> Statistics:
        """What the losses of held-out pairs read of all of them."""
        assert self.held_out is not None
        device = self.compute.device
        found = batch_statistics.of_batch(self.objective, compared, rows, self.held_out, device, late=True)
        if self.objective.needs_running_mean:
            found = found.with_running_mean(batch_statistics.running(self.state))
        return found

    def on_log(self, row: dict[str, float]) -> None:
        self.monitor.check(row)

    @torch.no_grad()
    def _check_start(self) -> None:
        """Check, before the first update, log-probs against those of each text alone, and log-ratios to be 0.

        The latter where the policy starts from its reference: they differ by how batches are packed, so by rounding.
        """
        if self.has_checkpoint:
            return
        batches, bound = self.pair_batches(0), None
        if self.compute.dtype != torch.float32:
            texts = [self.train_set.sequences[i] for batch in batches[:1] for i in batch.completions]
            rounding = start_check.measure(self.model, texts, self.compute, self.dummy_loss)
            rounding.require_right_packing()
            bound = rounding.bound
        if self.objective.needs_reference:
            self._check_log_ratios(batches, bound)

    def _check_log_ratios(self, batches: list[PairBatch], bound: float | None) -> None:
        """`bound`: the largest log-ratio by the root of a completion's tokens; None: `_LARGEST_START` for each."""
        compared = self.compare_all(batches, self.train_set)
        every = collectives.gather([_largest_ratios(each.logps) for _, each in compared])
        largest, by_root = (start_check.highest(x[i] for found in every for x in found) for i in (0, 1))
        config = self.config
        same = setup.content_of(*config.reference) == setup.content_of(config.model, config.revision)
        within = largest <= _LARGEST_START if bound is None else by_root <= bound
        if same and not within:  # NaN too
            raise NumericalError(
                f"policy and reference are the same model, yet a log-ratio of the first batch is {largest:.3g}",
                hint="was the cache written by other software or hardware? try another --cache-dir",
            )
        start = "" if same else " (the policy does not start from its reference)"
        log.say(f"log-ratios before the first update: at most {largest:.1e}{start}")


def method_name(config: TrainDPO) -> str:
    """The name of the method in evaluation rows."""
    name = "dpo" if config.loss == "sigmoid" else config.loss
    if config.is_unpaired and config.loss == "kto":
        return "kto-unpaired"
    if config.soft_labels is None:
        return name
    return f"{name}-{VOTES}" if config.soft_labels == VOTES else f"{name}-soft"


def _largest_ratios(p: PairLogps) -> tuple[float, float]:
    """The largest log-ratio of a micro-batch's completions, and the largest by the root of a completion's tokens."""
    ratios, tokens = torch.cat([p.c, p.r]).abs(), torch.cat([p.chosen_tokens, p.rejected_tokens])
    return float(ratios.max()), float((ratios / tokens.sqrt()).max())


def _sums(p: PairLogps, beta: float) -> Sums:
    """Sums and weights of what is logged: implicit rewards, margins, accuracy, log-probs, lengths."""
    n = float(len(p.chosen))
    margin = beta * p.d.detach()
    values = {
        "rewards/chosen": beta * p.c,
        "rewards/rejected": beta * p.r,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float(),
        "logps/chosen": p.chosen,
        "logps/rejected": p.rejected,
        "length/chosen": p.chosen_tokens,
        "length/rejected": p.rejected_tokens,
    }
    return {name: (value.detach().double().sum(), n) for name, value in values.items()}
