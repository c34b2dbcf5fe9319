"""Direct preference optimization and its relatives: reference log-probs once, then updates on pairs (2305.18290)."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import log
from ..config.dpo import TrainDPO
from ..data.encode import PairData, encode_pairs
from ..data.readers import Rows
from ..errors import NumericalError
from ..models.logprobs import Sequences, summed_logps
from ..models.routing import RoutedTokens
from ..models.tokenizers import require_same_tokenizer
from ..objectives.preference import LOSSES, PairLogps
from ..outputs.claims import Output
from ..runtime import collectives, fsdp
from ..runtime.devices import to_device
from ..runtime.fsdp_root import is_sharded
from . import held_out as held_out_files
from . import pairs, setup, start_check
from .displacement import LogRatioMonitor
from .frontier import FrontierEvaluation
from .metrics import Meter, Sums
from .pair_task import PairTask
from .pairs import PairBatch
from .reference_cache import ReferenceCache

_LARGEST_START = 1e-2  # float32's rounding of a sum over a response


class Dataset(NamedTuple):
    """Pairs, the sequences of their unique completions, and the reference's summed log-probs of those [completions]."""

    pairs: PairData
    sequences: Sequences
    ref_logps: Tensor


class Micro(NamedTuple):
    """Pairs forwarded together, and the batch mean that KTO's loss reads (None for the others)."""

    batch: PairBatch
    batch_mean: Tensor | None


class DPO(PairTask):
    """A policy that learns from pairs by the objective of --loss, relative to its reference."""

    config: TrainDPO
    next_command = "dpoctl evaluate --model {out} --ref {ref} --prompts PROMPTS.jsonl --out eval.jsonl"

    def __init__(self, config: TrainDPO, output: Output):
        super().__init__(config, output)
        self.ref = config.ref or config.model
        self.objective = LOSSES[config.loss]
        given = {name: getattr(config, name) for name in self.objective.options}
        self.loss_options = {name: value for name, value in given.items() if value is not None}
        rows, held_out_rows = held_out_files.load_rows(config, "preferences")
        held_out_files.warn_of_shared(rows, held_out_rows)
        self.data = self._encode(rows)
        self.trains_chats = self.data.counts["chats"] > 0
        held_out = self._encode(held_out_rows) if held_out_rows else None
        self.train_set = self._with_reference(self.data)
        self.stream = pairs.pair_stream(self.data, config, config.shuffle)
        self.held_out = self._with_reference(held_out) if held_out else None
        self.has_held_out = held_out is not None
        self._check_start()
        self.parts = held_out_files.parts_of(held_out.lines, config.eval_data) if held_out else {}
        self.extra_metrics = dict(self.data.counts) | held_out_files.counts_of(rows)
        self.monitor = LogRatioMonitor(config.loss, config.beta, self.objective)
        if config.eval_prompts:
            trained_on = {tuple(p) for p in self.data.prompts}
            self.frontier = FrontierEvaluation(config, self, method_name(config), trained_on)

    def _encode(self, rows: Rows) -> PairData:
        data = encode_pairs(rows, self.codec, setup.lengths(self.config, self.model))
        size = f"{len(data.pairs)} pairs over {len(data.completions)} completions of {len(data.prompts)} prompts"
        log.say(f"{rows.path}: {size}")
        return data

    def _with_reference(self, data: PairData) -> Dataset:
        """The data with the reference's log-probs; zeros for an objective without a reference."""
        config, sequences = self.config, pairs.sequences(data)
        if not self.objective.needs_reference:
            return Dataset(data, sequences, torch.zeros(len(sequences)))
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
        return Dataset(data, sequences, cache.logps(self._load_reference, sequences, self.compute))

    def _load_reference(self) -> Any:
        if self.ref == self.config.model:
            return self.model  # not trained yet: the same weights
        reference, tokenizer, _ = self.open_model(*self.config.reference)
        require_same_tokenizer(self.tokenizer, tokenizer, self.config.model, self.ref)
        setup.shard_model(self.config, reference, self.compute)
        return reference

    # --- an update

    def micro_batches(self, step: int) -> list[Micro]:
        batches = self.pair_batches(step)
        mean = self._batch_mean(batches) if self.objective.needs_batch_mean else None
        return [Micro(batch, mean) for batch in batches]

    def loss(self, micro: Micro) -> tuple[Tensor, Sums]:
        batch, n = micro.batch, micro.batch.n_global
        routed = self.balance.watch(pairs.counts(batch))
        logps = self._pair_logps(batch, self.train_set, micro.batch_mean, routed)
        losses = self.objective.loss(logps, self.config.beta, **self.loss_options)
        balance, logged = self.balance.loss(routed, len(batch.pairs) / n)
        return losses.sum() / n + balance, _sums(logps, self.config.beta) | logged

    def texts(self, micro: Micro) -> tuple[Sequences, list[float]]:
        sequences = [self.train_set.sequences[i] for i in micro.batch.completions]
        return sequences, pairs.counts(micro.batch)

    def dummy_loss(self) -> Tensor:
        return summed_logps(self.model, [([0, 0], 1)]).sum()

    def tokens(self, micro: Micro) -> int:
        return pairs.batch_tokens(self.data, micro.batch)

    def _pair_logps(
        self,
        batch: PairBatch,
        dataset: Dataset,
        batch_mean: Tensor | None = None,
        routed: RoutedTokens | None = None,
    ) -> PairLogps:
        """The policy's and the reference's log-probs of a micro-batch's pairs."""
        device = self.compute.device
        policy = pairs.batch_logps(self.model, dataset.sequences, batch, routed)
        reference = to_device(dataset.ref_logps[batch.completions], device)
        lengths = [float(len(dataset.pairs.completions[i])) for i in batch.completions]
        tokens = to_device(torch.tensor(lengths), device)
        w, l = to_device(batch.pairs, device).unbind(1)  # noqa: E741
        return PairLogps(policy[w], policy[l], reference[w], reference[l], tokens[w], tokens[l], batch_mean)

    @torch.no_grad()
    def _batch_mean(self, batches: list[PairBatch]) -> Tensor:
        """Mean of c and r over the global batch: KTO's z before its clamp."""
        total = torch.zeros((), device=self.compute.device)
        with self.compute.autocast():
            for batch in fsdp.in_lockstep(self.model, batches, self.dummy_loss):
                p = self._pair_logps(batch, self.train_set)
                total += (p.c.sum() + p.r.sum()) / (2 * batch.n_global)
        return collectives.sum_over_ranks(total)

    # --- around the updates

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The logged metrics and the loss over all held-out pairs, and with `NAME/` before them over each file's."""
        assert self.held_out is not None
        data = self.held_out.pairs
        every, rank, world = list(range(len(data.pairs))), collectives.rank(), collectives.world_size()
        batches = pairs.micro_batches(data, every, self.config.tokens_per_batch, rank, world)
        with self.compute.autocast():
            in_lockstep = fsdp.in_lockstep(self.model, batches, self.dummy_loss)
            compared = [(batch.rows, self._pair_logps(batch, self.held_out)) for batch in in_lockstep]
        metrics = self._held_out_metrics([p for _, p in compared], len(every))
        for name, members in self.parts.items():
            if members:
                kept = [_only(p, rows, set(members)) for rows, p in compared]
                of_part = self._held_out_metrics([p for p in kept if len(p.chosen)], len(members))
                metrics |= {f"{name}/{key}": value for key, value in of_part.items()}
        return metrics

    def _held_out_metrics(self, compared: list[PairLogps], pairs_of_all_ranks: int) -> dict[str, float]:
        mean, meter = None, Meter()
        if self.objective.needs_batch_mean:
            total = sum((p.c.sum() + p.r.sum() for p in compared), torch.zeros((), device=self.compute.device))
            mean = collectives.sum_over_ranks(total / (2 * pairs_of_all_ranks))
        for p in compared:
            losses = self.objective.loss(replace(p, batch_mean=mean), self.config.beta, **self.loss_options)
            meter.add("loss", losses.double().sum(), float(len(p.chosen)))
            meter.add_all(_sums(p, self.config.beta))
        return meter.take()

    def on_log(self, row: dict[str, float]) -> None:
        self.monitor.check(row)

    @torch.no_grad()
    def _check_start(self) -> None:
        """Check, before the first update, log-probs against those of each text alone, and log-ratios to be 0.

        The latter where the policy starts from its reference: they differ by how batches are packed, so by rounding.
        """
        if self.has_checkpoint:
            return
        micros, bound = self.micro_batches(0), None
        if self.compute.dtype != torch.float32:
            texts = [text for micro in micros[:1] for text in self.texts(micro)[0]]
            rounding = start_check.measure(self.model, texts, self.compute, self.dummy_loss)
            rounding.require_right_packing()
            bound = rounding.bound
        if self.objective.needs_reference:
            self._check_log_ratios(micros, bound)

    def _check_log_ratios(self, micros: list[Micro], bound: float | None) -> None:
        """`bound`: the largest log-ratio by the root of a completion's tokens; None: `_LARGEST_START` for each."""
        with self.compute.autocast():
            in_lockstep = fsdp.in_lockstep(self.model, micros, self.dummy_loss)
            compared = [self._pair_logps(micro.batch, self.train_set) for micro in in_lockstep]
        every = collectives.gather([_largest_ratios(p) for p in compared])
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
    return "dpo" if config.loss == "sigmoid" else config.loss


def _largest_ratios(p: PairLogps) -> tuple[float, float]:
    """The largest log-ratio of a micro-batch's completions, and the largest by the root of a completion's tokens."""
    ratios, tokens = torch.cat([p.c, p.r]).abs(), torch.cat([p.chosen_tokens, p.rejected_tokens])
    return float(ratios.max()), float((ratios / tokens.sqrt()).max())


def _only(p: PairLogps, rows: list[int], members: set[int]) -> PairLogps:
    """The pairs of a micro-batch, whose indices are `rows`, that are among `members`."""
    kept = torch.tensor([row in members for row in rows], device=p.chosen.device)
    tensors = {f.name: getattr(p, f.name)[kept] for f in fields(p) if f.name != "batch_mean"}
    return replace(p, **tensors)


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
