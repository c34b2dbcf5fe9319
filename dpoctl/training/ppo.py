"""One PPO step, as PAPER section 6 lists its details: roll out, score, advantages, some passes of clipped updates.

Everything random is a function of the seed, the prompt and the step, and the rest of the state is in `state`, so a run
that is continued at any step is the uninterrupted one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from typing import Any

import torch
from torch import Tensor

from .. import log
from ..data.batching import Stream, pack, permutation, share
from ..errors import InputError, NumericalError
from ..inference import policy_evaluation
from ..inference.generate import batch_slices, generate
from ..inference.scorers import Scorer
from ..models.logprobs import micro_batches, response_token_logps
from ..models.rewards import ActorCritic
from ..objectives import ppo
from ..runtime import collectives, devices
from .loop import Run, listed


@dataclass
class Episodes:
    """A step's prompts and responses: rows with text and ids, `sequences` (ids, start) with EOS where one ended."""

    rows: list[dict]
    sequences: list[tuple[list[int], int]]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) - start for ids, start in self.sequences]


@dataclass
class Experience:
    """What a step learns from, per response token [B, T] (0 behind the end)."""

    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass
class Trainer:
    """The models, the reward and what changes from step to step."""

    config: Any
    critic: ActorCritic
    reference: Any
    as_reference: Callable[[], AbstractContextManager]  # within it, `reference` is the reference
    tokenizer: Any
    reward: Scorer
    prompts: list[dict]
    ids: list[list[int]]
    stream: Stream
    device: torch.device
    dtype: torch.dtype
    state: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state |= {"kl_coef": self.config.kl_coef, "episodes": 0, "moments": [0, 0.0, 0.0], "flops": 0}

    def step(self, step: int, run: Run) -> float:
        """One PPO step; returns the mean loss of its updates."""
        with self._timed("generating"):
            episodes = self.roll_out(step)
        with self._timed("scoring"):
            scores = self.score(episodes)
        with self._timed("log_probs"):
            experience, metrics = self.evaluate(episodes, scores, step, run)
        with self._timed("learning"):
            loss = self.learn(episodes, experience, step, run)
        run.meter.add_all(metrics)
        self.state["flops"] += self._flops(episodes)
        return loss

    # --- the parts of a step, in order

    def roll_out(self, step: int) -> Episodes:
        """Sample a response to each prompt of the step; k of the random numbers is the pass over the prompts.

        The waves are dealt over the ranks, and every rank gets all episodes, in the prompts' order.
        """
        first = step * self.config.batch_size
        places = list(enumerate(self.stream.batch(step), start=first))
        groups = [(e, [i for _, i in g]) for e, g in groupby(places, key=lambda place: place[0] // self.stream.n)]
        dealt = [(e, m[w]) for e, m in groups for w in batch_slices(len(m), 1, self.config.generation_batch_size)]
        own = [
            self._roll_out_batch(epoch, members)
            for epoch, members in dealt[collectives.rank() :: collectives.world_size()]
        ]
        every = _in_order(collectives.gather(own))
        return Episodes([row for batch in every for row in batch.rows], [s for batch in every for s in batch.sequences])

    def _roll_out_batch(self, epoch: int, members: list[int]) -> Episodes:
        rows, ids = [self.prompts[i] for i in members], [self.ids[i] for i in members]
        keys, sampling = [row["prompt_id"] for row in rows], policy_evaluation.sampling_of(self.config)
        with devices.autocast(self.device, self.dtype):
            responses = generate(self.critic.policy, self.tokenizer, ids, keys, [epoch], sampling, self.config.seed)
        ends = {"stop": [self.tokenizer.eos_token_id], "length": []}
        sequences = [(p + c.ids + ends[c.finish], len(p)) for p, [c] in zip(ids, responses, strict=True)]
        return Episodes(policy_evaluation.completion_rows(self.tokenizer, rows, ids, responses), sequences)

    def score(self, episodes: Episodes) -> Tensor:
        """Rewards [B] of the texts, a response that never ended getting the penalty where there is one."""
        own = episodes.rows[collectives.rank() :: collectives.world_size()]
        values = _in_order(collectives.gather(self.reward.score(own).values))
        scores = torch.tensor(values, dtype=torch.float64)
        if self.config.missing_eos_penalty is not None:
            unfinished = torch.tensor([row["finish"] == "length" for row in episodes.rows])
            scores[unfinished] = self.config.missing_eos_penalty
        return scores

    @torch.no_grad()
    def evaluate(self, episodes: Episodes, scores: Tensor, step: int, run: Run) -> tuple[Experience, dict]:
        """Old log-probs with values in one forward, the reference's in one pass; rewards, advantages, figures.

        Ranks share the forwards; what follows every rank computes alike, over the whole batch.
        """
        config, coefficient = self.config, self.state["kl_coef"]
        mask = _mask(episodes.lengths)
        logps, values, ref_logps, entropies = (torch.zeros(mask.shape) for _ in range(4))
        groups = list(micro_batches(episodes.sequences, config.tokens_per_batch))
        for indices in groups[collectives.rank() :: collectives.world_size()]:
            batch = [episodes.sequences[i] for i in indices]
            with devices.autocast(self.device, self.dtype):
                own, value, entropy, _ = self.critic(batch, config.temperature, entropy=True)
                with self.as_reference():
                    other, _ = response_token_logps(self.reference, batch, config.temperature)
            for target, flat in ((logps, own), (values, value), (entropies, entropy), (ref_logps, other)):
                _scatter(target, indices, mask, flat)
        for each in (logps, values, ref_logps, entropies):
            collectives.sum_over_ranks(each)  # every row is one rank's, and 0 on the others
        log_ratios = (logps - ref_logps).double().sum(1)
        kl = log_ratios.mean().item()
        if not kl <= config.max_kl:
            raise NumericalError(
                f"step {step + 1}: the sequence KL is {kl:.1f}, above --max-kl {config.max_kl:g}: it runs away",
                hint=f"{run.last_good()}; a larger --kl-coef or an adaptive --target-kl holds it",
            )
        used = self._normalized(scores).float()
        rewards = ppo.token_rewards(logps, ref_logps, used, mask, coefficient)
        if config.whiten_rewards:
            rewards = ppo.whiten(rewards, mask, keep_mean=True)
        advantages, returns = ppo.gae(rewards, values, mask, config.gamma, config.lam)
        n, tokens = float(len(scores)), float(mask.sum())
        self.state["episodes"] += len(scores)
        metrics = {
            "objective/kl": (log_ratios.sum().item(), n),
            "objective/kl_coef": (coefficient, 1.0),
            "objective/scores": (scores.sum().item(), n),
            "objective/scores_std": (scores.std(correction=0).item(), 1.0),
            "objective/entropy": (entropies.double().sum().item(), tokens),
            "val/explained_variance": (ppo.explained_variance(values[mask].double(), returns[mask].double()), 1.0),
            "length/response": (tokens, n),
            "ended": (float(sum(row["finish"] == "stop" for row in episodes.rows)), n),
            "episode": (self.state["episodes"], max),
        }
        if config.target_kl is not None:
            self.state["kl_coef"] = ppo.next_kl_coef(coefficient, kl, config.target_kl, len(scores), config.kl_horizon)
        return Experience(mask, logps, values, ppo.whiten(advantages, mask), returns), metrics

    def learn(self, episodes: Episodes, experience: Experience, step: int, run: Run) -> float:
        """The passes over the step's episodes, mini-batch by mini-batch; returns the mean loss."""
        config, size, losses = self.config, self.config.minibatch_size, []
        lengths, whole = episodes.lengths, [len(ids) for ids, _ in episodes.sequences]
        for epoch in range(config.ppo_epochs):
            order = permutation(config.seed, step * config.ppo_epochs + epoch, len(lengths)).tolist()
            for start in range(0, len(order), size):
                members = order[start : start + size]
                tokens = sum(lengths[i] for i in members)
                own = share(members, whole.__getitem__, collectives.rank(), collectives.world_size())
                groups = pack(own, whole.__getitem__, whole.__getitem__, config.tokens_per_batch)
                micros = [(group, tokens, sum(whole[i] for i in group)) for group in groups]
                losses.append(
                    run.optimize(
                        micros,
                        lambda micro: self._loss(episodes, experience, micro[0], micro[1]),
                        f"PPO step {step + 1}, pass {epoch + 1} (prompt_id "
                        f"{listed(episodes.rows[i]['prompt_id'] for i in members)})",
                    )
                )
        return sum(losses) / len(losses)

    def _loss(self, episodes: Episodes, experience: Experience, group: list[int], tokens: int) -> tuple[Tensor, dict]:
        """A micro-batch's share of the mini-batch's token mean: policy loss + vf_coef times the value loss."""
        config = self.config
        mask = experience.mask[group]
        old_logps, old_values, advantages, returns = (
            t[group][mask].to(self.device)
            for t in (experience.logps, experience.values, experience.advantages, experience.returns)
        )
        logps, values, _, _ = self.critic([episodes.sequences[i] for i in group], config.temperature)
        policy, clipped = ppo.policy_loss(logps, old_logps, advantages, config.clip)
        value, value_clipped = ppo.value_loss(values, old_values, returns, config.value_clip)
        n = float(len(logps))
        sums = torch.stack(
            [x.detach().double().sum() for x in (policy, value, clipped, value_clipped, 0.5 * (logps - old_logps) ** 2)]
        ).tolist()
        names = (
            "loss/policy_avg",
            "loss/value_avg",
            "policy/clipfrac_avg",
            "val/clipfrac_avg",
            "policy/approxkl_avg",
        )
        metrics = {name: (total, n) for name, total in zip(names, sums, strict=True)}
        return (policy.sum() + config.vf_coef * value.sum()) / tokens, metrics

    # --- bookkeeping

    def _normalized(self, scores: Tensor) -> Tensor:
        if not self.config.normalize_rewards:
            return scores
        moments = ppo.RunningMoments(*self.state["moments"])
        moments.update(scores)
        self.state["moments"] = [moments.count, moments.mean, moments.m2]
        return moments.normalize(scores)

    def _flops(self, episodes: Episodes) -> int:
        """Estimate of what is not training: 2 per parameter and token, for generating and for log-probs and values."""
        tokens = sum(len(ids) for ids, _ in episodes.sequences)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (self.critic.policy, self.critic, self.reference)]
        return 2 * tokens * sum(sizes)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - start

    def take_seconds(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


def _in_order(dealt: list[list]) -> list:
    """Items that were dealt out one by one, back in their order: [[a, c], [b]] is [a, b, c]."""
    return [item for one_of_each in zip_longest(*dealt, fillvalue=None) for item in one_of_each if item is not None]


def _mask(lengths: list[int]) -> Tensor:
    """True [B, T] on the tokens of responses of these lengths."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def _scatter(target: Tensor, rows: list[int], mask: Tensor, flat: Tensor) -> None:
    """Put the per-token values [N] of some rows into `target` [B, T]."""
    part = torch.zeros(len(rows), mask.shape[1])
    part[mask[rows]] = flat.float().cpu()
    target[rows] = part


def check_room(path: str, ids: list[list[int]], lines: list[int], config, context: int | None) -> None:
    """Raises InputError, by file and line, for a prompt that leaves no room for a whole response."""
    limit = min(config.max_length, context or config.max_length)
    for prompt, line in zip(ids, lines, strict=True):
        if len(prompt) + config.max_new_tokens > limit:
            raise InputError(
                f"{path}:{line}: prompt: {len(prompt)} tokens and --max-new-tokens {config.max_new_tokens} are more than "
                f"the {limit} that fit (--max-length, the model's context)",
                hint="a smaller --max-new-tokens or --max-prompt-length",
            )


def warn_of_reach(config, steps: int) -> None:
    """Say where the controller cannot move the coefficient far enough to steer anything in this run."""
    if config.target_kl is None:
        return
    reach = (1.0 + 0.2 * config.batch_size / config.kl_horizon) ** steps
    if reach < 2.0:
        log.warn(
            f"--target-kl {config.target_kl:g} can hardly be reached: in {steps} steps of {config.batch_size} episodes, "
            f"--kl-horizon {config.kl_horizon} lets the coefficient grow by a factor of {reach:.2f} at most. Start "
            f"--kl-coef near its final value, or lower the horizon"
        )
