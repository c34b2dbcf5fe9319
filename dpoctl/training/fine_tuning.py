"""Supervised fine-tuning: next-token loss on texts, on completions, or on one side of preferences (Preferred-FT)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import log
from ..config.training import SFT
from ..data.batching import Stream, pack, share, shuffled
from ..data.codec import Codec
from ..data.encode import Example, Limits, encode_examples
from ..data.readers import Rows
from ..models.logprobs import Sequences, response_token_logps
from ..outputs.claims import Output
from ..runtime import collectives, fsdp
from ..runtime.devices import to_device
from . import held_out as held_out_files
from . import setup
from .frontier import FrontierEvaluation
from .metrics import Meter, Sums
from .task import BatchTask, listed


class Micro(NamedTuple):
    """Examples forwarded together, and the trained tokens of the whole batch, over which the loss is averaged."""

    examples: list[Example]
    batch_tokens: int


class FineTuning(BatchTask):
    """Mean negative log-likelihood over the trained tokens of the global batch."""

    config: SFT
    next_command = "dpoctl make-prefs --model {out} --prompts PROMPTS.jsonl --out prefs.jsonl"

    def __init__(self, config: SFT, output: Output):
        super().__init__(config, output)
        rows, held_out_rows = held_out_files.load_rows(config, kind_of(config))
        held_out_files.warn_of_shared(rows, held_out_rows)
        self.examples, counts = encode(config, rows, self.codec, setup.lengths(config, self.model))
        self.trains_chats = counts["chats"] > 0
        self.held_out = self._encode_held_out(held_out_rows)
        self.parts = held_out_files.parts_of([e.line for e in self.held_out], config.eval_data)
        self.has_held_out = bool(self.held_out)
        self.select, self.patience = "loss" if config.select == "best" else "", config.patience
        self.stream = stream_of(config, len(self.examples))
        self.extra_metrics = dict(counts) | held_out_files.counts_of(rows)
        if self.held_out:  # also of a resumed run it is the untouched model's: checkpoints are loaded later
            self.extra_metrics["eval/loss_before"] = self.evaluate()["loss"]
            log.say(f"held-out loss before training: {self.extra_metrics['eval/loss_before']:.4f}")
        if config.eval_prompts:
            trained_on = {tuple(e.ids[: e.start]) for e in self.examples}
            self.frontier = FrontierEvaluation(config, self, method_name(config), trained_on)

    def _encode_held_out(self, rows: Rows | None) -> list[Example]:
        config = self.config
        return encode(config, rows, self.codec, setup.lengths(config, self.model))[0] if rows else []

    def micro_batches(self, step: int) -> list[Micro]:
        batch = [self.examples[i] for i in self.stream.batch(step)]
        total = sum(e.trained for e in batch)
        return [Micro(group, total) for group in share_and_pack(batch, self.config.tokens_per_batch)]

    def loss(self, micro: Micro) -> tuple[Tensor, Sums]:
        sequences, counts = self.texts(micro)
        routed = self.balance.watch(counts)
        logps = self._trained_logps(micro.examples, routed)
        balance, logged = self.balance.loss(routed, len(logps) / micro.batch_tokens)
        return -logps.sum() / micro.batch_tokens + balance, logged

    def _trained_logps(self, examples: list[Example], routed: Any = None) -> Tensor:
        """The log-probs of all trained tokens, one example after the other."""
        logps, _ = response_token_logps(self.model, [(e.ids, e.start) for e in examples], routed=routed)
        if not any(e.gaps for e in examples):
            return logps
        kept = [i for i, trained in enumerate(t for e in examples for t in e.mask) if trained]
        return logps.index_select(0, to_device(torch.tensor(kept), logps.device))

    def texts(self, micro: Micro) -> tuple[Sequences, list[float]]:
        return [(e.ids, e.start) for e in micro.examples], [1.0] * len(micro.examples)

    def dummy_loss(self) -> Tensor:
        return response_token_logps(self.model, [([0, 0], 1)])[0].sum()

    def tokens(self, micro: Micro) -> int:
        return sum(len(e.ids) for e in micro.examples)

    def describe(self, step: int) -> str:
        return "rows at lines " + listed(self.examples[i].line for i in self.stream.batch(step))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss per token of the held-out rows, and as `NAME/loss` that of each file's."""
        if not self.parts:
            return self._held_out_meter(self.held_out).take()
        every = Meter()
        metrics: dict[str, float] = {}
        for name, members in self.parts.items():
            meter = self._held_out_meter([self.held_out[i] for i in members])
            every.add_all({key: (meter.sums[key], meter.weights[key]) for key in meter.sums})
            metrics |= {f"{name}/{key}": value for key, value in meter.take().items()}
        return every.take() | metrics

    def _held_out_meter(self, examples: list[Example]) -> Meter:
        meter = Meter()
        groups = share_and_pack(examples, self.config.tokens_per_batch)
        with self.compute.autocast():
            for group in fsdp.in_lockstep(self.model, groups, self.dummy_loss):
                logps = self._trained_logps(group)
                meter.add("loss", -logps.double().sum(), float(len(logps)))
        meter.settle()
        return meter


def method_name(config: SFT) -> str:
    """The paper's name of the method."""
    return "preferred-ft" if config.field else "sft"


def stream_of(config: SFT, n: int) -> Stream:
    """Batches of `n` examples in the order of --seed."""
    return Stream(n, config.batch_size, config.epochs, config.max_steps, shuffled(config.seed, n))


def share_and_pack(examples: list[Example], tokens: int, world: int | None = None) -> list[list[Example]]:
    """This rank's examples (rank 0's of `world` ranks, where given) in groups of at most `tokens` tokens."""

    def length(example: Example) -> int:
        return len(example.ids)

    rank, size = (collectives.rank(), collectives.world_size()) if world is None else (0, world)
    return pack(share(examples, length, rank, size), length, length, tokens)


def kind_of(config: SFT) -> str:
    """The kind of rows that are trained on."""
    return "preferences" if config.field else "text"


def encode(config: SFT, rows: Rows, codec: Codec, limits: Limits) -> tuple[list[Example], dict[str, int]]:
    """(examples, counts) of rows. Raises InputError as encode_examples does."""
    examples, counts = encode_examples(
        rows,
        codec,
        limits,
        field=config.field,
        turns=config.answers,
        overlong=config.overlong,
    )
    tokens = sum(len(e.ids) for e in examples)
    trained = counts["trained_tokens"]
    log.say(f"{rows.path}: {len(examples)} examples, {tokens} tokens, {trained} of them trained on")
    return examples, counts
