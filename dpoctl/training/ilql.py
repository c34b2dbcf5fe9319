"""Implicit language Q-learning: values of tokens beside a policy, from completions with returns (2206.11871)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import log
from ..config.ilql import TrainILQL
from ..data.batching import Stream, pack, share, shuffled
from ..data.codec import Codec
from ..data.encode import Limits
from ..data.gaps import size
from ..data.readers import Rows
from ..data.returns import Episode, encode_returns
from ..models import ilql
from ..models.logprobs import SHORTEST, Sequences
from ..objectives.ilql import TokenValues, Weights, ilql_losses, is_last
from ..outputs.claims import Output
from ..runtime import collectives
from ..runtime.devices import to_device
from . import held_out as held_out_files
from . import setup
from .metrics import Meter, Sums
from .task import BatchTask, listed

if TYPE_CHECKING:
    from .loop import Trainer


class Micro(NamedTuple):
    """Completions forwarded together, and the tokens of the whole batch's, over which the loss is averaged."""

    episodes: list[Episode]
    batch_tokens: int


class ILQL(BatchTask):
    """V and two Q heads on the policy's trunk, and the policy, which learns to imitate all completions.

    The targets of the Q heads follow them after every --target-every updates: the number of the update is the counter,
    so that a resumed run goes on in step.
    """

    config: TrainILQL
    unit = "completions"
    next_command = (
        "dpoctl evaluate --model {out} --ilql-beta 0,1,2,4 --ref {ref} --prompts PROMPTS.jsonl --out eval.jsonl"
    )

    def __init__(self, config: TrainILQL, output: Output):
        super().__init__(config, output)
        ilql.require_plain_head(self.policy, config.model)
        rows, held_out_rows = held_out_files.load_rows(config, config.rows)
        held_out_files.warn_of_shared(rows, held_out_rows)
        limits = setup.lengths(config, self.policy)
        self.episodes, counts = encode(config, rows, self.codec, limits)
        self.trains_chats = counts["chats"] > 0
        self.held_out = encode(config, held_out_rows, self.codec, limits)[0] if held_out_rows else []
        self.has_held_out = bool(self.held_out)
        self.parts = held_out_files.parts_of([e.line for e in self.held_out], config.eval_data)
        self.mean, self.scale = moments(self.episodes, config.normalize)
        self.weights = Weights(config.tau, config.gamma, config.cql_coef, config.sft_coef)
        self.stream = stream_of(config, len(self.episodes))
        self.model = ilql.IlqlModel(self.policy, ilql.make_heads(self.policy, config.seed))
        self.extra_metrics = dict(counts) | held_out_files.counts_of(rows)
        self.extra_metrics |= {"return_mean": self.mean, "return_scale": self.scale}
        of_heads = sum(p.numel() for p in self.model.heads.parameters())
        log.say(f"value heads: {of_heads:,} weights; returns are shifted by {self.mean:g}, divided by {self.scale:g}")

    @property
    def saved_model(self) -> Any:
        return self.adapters or self.policy

    @property
    def further_tensors(self) -> dict[str, Tensor]:
        return self.model.target_weights()

    # --- an update

    def micro_batches(self, step: int) -> list[Micro]:
        batch = [self.episodes[i] for i in self.stream.batch(step)]
        total = _tokens(batch)
        return [Micro(group, total) for group in share_and_pack(batch, self.config.tokens_per_batch)]

    def step(self, step: int, trainer: "Trainer") -> float:
        loss = super().step(step, trainer)
        if (step + 1) % self.config.target_every == 0:
            self.model.heads.update_targets(self.config.target_rate)
        return loss

    def loss(self, micro: Micro) -> tuple[Tensor, Sums]:
        sequences, counts = self.texts(micro)
        routed = self.balance.watch(counts)
        tokens = self.model(sequences, routed)
        losses, sums = self._losses(tokens, micro.episodes)
        balance, logged = self.balance.loss(routed, len(losses) / micro.batch_tokens)
        return losses.sum() / micro.batch_tokens + balance, sums | logged

    def _losses(self, tokens: TokenValues, episodes: list[Episode]) -> tuple[Tensor, Sums]:
        """(the loss of each token [N], what is logged) of completions."""
        values = torch.tensor([e.value for e in episodes], dtype=torch.float64)
        returns = to_device(((values - self.mean) / self.scale).float(), tokens.values.device)
        found = ilql_losses(tokens, returns, self.weights)
        n = float(len(tokens.values))
        sums: Sums = {
            f"loss/{name}": (found[name].detach().double().sum(), n) for name in ("q", "value", "cql", "policy")
        }
        last = is_last(tokens.owner)
        q = 0.5 * (tokens.q[0] + tokens.q[1]).detach().double()
        sums |= {"val/q": (q.sum(), n), "val/value": (tokens.values.detach().double().sum(), n)}
        sums |= {"val/target_q": (tokens.target_q.double().sum(), n)}
        sums |= {"val/last_q": ((q * last).sum(), float(len(episodes)))}
        return found["total"], sums | {"val/return": (returns.double().sum(), float(len(episodes)))}

    def texts(self, micro: Micro) -> tuple[Sequences, list[float]]:
        return sequences_of(micro.episodes), [1.0] * len(micro.episodes)

    def dummy_loss(self) -> Tensor:
        tokens = self.model(SHORTEST)
        return ilql_losses(tokens, torch.zeros(1, device=tokens.values.device), self.weights)["total"].sum()

    def tokens(self, micro: Micro) -> int:
        return sum(len(e.sequence[0]) for e in micro.episodes)

    def flops(self, micro: Micro) -> int:
        return super().flops(micro) + _tokens(micro.episodes) * self.model.heads.flops()

    def describe(self, step: int) -> str:
        return "rows at lines " + listed(self.episodes[i].line for i in self.stream.batch(step))

    # --- around the updates

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss and its terms on the held-out rows, and as `NAME/loss` the loss on each file's."""
        every = self._held_out_meter(self.held_out)
        metrics: dict[str, float] = {}
        for name, members in self.parts.items():
            metrics[f"{name}/loss"] = self._held_out_meter([self.held_out[i] for i in members])["loss"]
        return every | metrics

    def _held_out_meter(self, episodes: list[Episode]) -> dict[str, float]:
        meter = Meter()
        with self.compute.autocast():
            for group in share_and_pack(episodes, self.config.tokens_per_batch):
                losses, sums = self._losses(self.model(sequences_of(group)), group)
                meter.add_all({"loss": (losses.double().sum(), float(len(losses)))} | sums)
        return meter.take()

    def save_more(self, dtype: torch.dtype) -> list[Path]:
        return [ilql.save_heads(self.model.heads, Path(self.config.out), dtype)]


def encode(config: TrainILQL, rows: Rows, codec: Codec, limits: Limits) -> tuple[list[Episode], dict[str, int]]:
    """(episodes, counts) of rows. Raises InputError as `encode_returns` does."""
    episodes, counts = encode_returns(rows, config.rows, codec, limits)
    log.say(f"{rows.path}: {len(episodes)} completions, {_tokens(episodes)} tokens of them")
    return episodes, counts


def moments(episodes: list[Episode], normalize: str) -> tuple[float, float]:
    """(mean, standard deviation) by which returns are normalised; (0, 1) without, and deviation 1 where it is 0."""
    if normalize == "none":
        return 0.0, 1.0
    values = torch.tensor([e.value for e in episodes], dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item() or 1.0


def stream_of(config: TrainILQL, n: int) -> Stream:
    """Batches of `n` completions in the order of --seed."""
    return Stream(n, config.batch_size, config.epochs, config.max_steps, shuffled(config.seed, n))


def share_and_pack(episodes: list[Episode], tokens: int, world: int | None = None) -> list[list[Episode]]:
    """This rank's completions (rank 0's of `world` ranks, where given) in groups of at most `tokens` tokens."""

    def length(episode: Episode) -> int:
        return len(episode.sequence[0])

    rank, size = (collectives.rank(), collectives.world_size()) if world is None else (0, world)
    return pack(share(episodes, length, rank, size), length, length, tokens)


def sequences_of(episodes: list[Episode]) -> Sequences:
    """(ids, start of the completion) of each."""
    return [e.sequence for e in episodes]


def _tokens(episodes: list[Episode]) -> int:
    """Tokens of the completions, as far as they are the policy's."""
    return sum(size(e.sequence) for e in episodes)
