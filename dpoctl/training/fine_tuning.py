"""Supervised fine-tuning: next-token loss on texts, on completions, or on one side of preferences (Preferred-FT)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import log
from ..config.training import SFT
from ..data.batching import Stream, pack, share, shuffled
from ..data.encode import Example, encode_examples
from ..data.readers import load_rows
from ..models.logprobs import Sequences, response_token_logps
from ..outputs.claims import Output
from ..runtime import collectives, fsdp
from . import setup
from .frontier import FrontierEvaluation
from .metrics import Meter
from .task import BatchTask, Sums, listed


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
        self.examples, counts = encode(config, config.data, self.tokenizer, *setup.lengths(config, self.model))
        self.held_out = self._encode_held_out()
        self.has_held_out = bool(self.held_out)
        self.stream = stream_of(config, len(self.examples))
        self.extra_metrics = dict(counts)
        if self.held_out:  # also of a resumed run it is the untouched model's: checkpoints are loaded later
            self.extra_metrics["eval/loss_before"] = self.evaluate()["loss"]
            log.say(f"held-out loss before training: {self.extra_metrics['eval/loss_before']:.4f}")
        if config.eval_prompts:
            trained_on = {tuple(e.ids[: e.start]) for e in self.examples}
            self.frontier = FrontierEvaluation(config, self, method_name(config), trained_on)

    def _encode_held_out(self) -> list[Example]:
        config = self.config
        if not config.eval_data:
            return []
        return encode(config, config.eval_data, self.tokenizer, *setup.lengths(config, self.model))[0]

    def micro_batches(self, step: int) -> list[Micro]:
        batch = [self.examples[i] for i in self.stream.batch(step)]
        total = sum(len(e.ids) - e.start for e in batch)
        return [Micro(group, total) for group in share_and_pack(batch, self.config.tokens_per_batch)]

    def loss(self, micro: Micro) -> tuple[Tensor, Sums]:
        sequences, counts = self.texts(micro)
        routed = self.balance.watch(counts)
        logps, _ = response_token_logps(self.model, sequences, routed=routed)
        balance, logged = self.balance.loss(routed, len(logps) / micro.batch_tokens)
        return -logps.sum() / micro.batch_tokens + balance, logged

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
        """The mean loss per token of the held-out rows."""
        meter = Meter()
        groups = share_and_pack(self.held_out, self.config.tokens_per_batch)
        with self.compute.autocast():
            for group in fsdp.in_lockstep(self.model, groups, self.dummy_loss):
                logps, _ = response_token_logps(self.model, [(e.ids, e.start) for e in group])
                meter.add("loss", -logps.double().sum().item(), float(len(logps)))
        return meter.take()


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


def encode(
    config: SFT, path: str, tokenizer: Any, max_length: int, max_prompt_length: int
) -> tuple[list[Example], dict[str, int]]:
    """(examples, counts) of the rows of a file. Raises InputError as load_rows and encode_examples do."""
    examples, counts = encode_examples(
        load_rows(path, "preferences" if config.field else "text", skip_bad=config.skip_bad_rows),
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        field=config.field,
        overlong=config.overlong,
    )
    tokens = sum(len(e.ids) for e in examples)
    cut = f", {counts['truncated']} truncated" if counts["truncated"] else ""
    log.say(f"{path}: {len(examples)} rows, {tokens} tokens{cut}")
    return examples, counts
