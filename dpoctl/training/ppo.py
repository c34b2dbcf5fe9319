"""Proximal policy optimisation of a policy on any reward, with a KL penalty to its reference (1909.08593, 1707.06347).

A step rolls out responses, scores them, computes advantages, and makes some passes of clipped updates. Everything
random is a function of the seed, the prompt and the step, and the rest of the state is in `state`, so a run that is
resumed at any step is byte-identical to the uninterrupted one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import log
from ..config.ppo import TrainPPO
from ..config.scorer import parse_scorer
from ..data.batching import Stream, pack, permutation, share, shuffled
from ..data.chats import prompt_of
from ..data.readers import load_rows
from ..errors import InputError, NumericalError
from ..inference.completions import PromptSet, completion_rows, prompt_set, sequences_of
from ..inference.generate import batch_slices, generate, sampling_of
from ..inference.policy_evaluation import Reference
from ..inference.scorers import RewardModelScorer, Scorer, ScorerOptions, load_scorer
from ..models import lora, precision, quantized, shared_weights
from ..models.flops import model_flops
from ..models.hub import is_adapter, resolve
from ..models.load import context_length, load_classifier
from ..models.logprobs import micro_batches, response_token_logps
from ..models.place import Place
from ..models.rewards import make_critic
from ..models.tokenizers import require_same_tokenizer
from ..objectives import ppo
from ..outputs import adapter_base
from ..outputs.claims import Output
from ..runtime import collectives
from ..runtime.devices import to_device
from ..runtime.sharing import dealt, map_shared
from . import setup
from .balance import say_left_out
from .experience import Episodes, Experience, mask_of, scatter
from .frontier import FrontierEvaluation
from .loop import Trainer
from .metrics import Sums
from .task import Task, listed


class Micro(NamedTuple):
    """Episodes forwarded together, the response tokens of their mini-batch, and the tokens that are forwarded."""

    members: list[int]
    minibatch_tokens: int
    tokens: int


class PPO(Task):
    """The models, the reward, and what changes from step to step."""

    config: TrainPPO
    unit = "episodes"
    next_command = "dpoctl evaluate --model {out} --ref {ref} --prompts PROMPTS.jsonl --out eval.jsonl"

    def __init__(self, config: TrainPPO, output: Output):
        super().__init__(config, output)
        self.ref = config.ref or config.model
        say_left_out(self.policy)
        self.reference, self.as_reference = self._open_reference()
        options = ScorerOptions(
            self.compute.device,
            config.reward_revision,
            config.scorer_trust_remote_code,
            config.score_text,
            config.score_type,
            config.scorer_tokens_per_batch,
            templates=replace(self.templates, template=None),
            dtype=self.compute.dtype,
        )
        self.reward = load_scorer(config.reward, self._on_base(options))
        if self.reward.options.apart:
            shared_weights.share_frozen(self.reward.model, [self.policy])  # type: ignore[attr-defined]
        rows = load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows, columns=config.columns)
        self.prompts = prompt_set(rows, self.codec, None, config.max_prompt_length)
        self.trains_chats = any(prompt_of(row).is_chat for row in self.prompts.rows)
        check_room(self.prompts, config, context_length(self.policy))
        self.stream = stream_of(config, len(self.prompts))
        warn_of_reach(config, self.stream.steps)
        reward_model = self._value_start()
        self.model = make_critic(self.policy, config.value_model, reward_model)
        trunk = self.model.trunk
        self.costs = model_flops(self.policy), None if trunk is None else model_flops(trunk)
        self.state |= {"kl_coef": config.kl_coef, "episodes": 0, "moments": [0, 0.0, 0.0], "flops": 0}
        self.seconds: dict[str, float] = {}
        self.episodes: Episodes
        self.experience: Experience
        method = method_name(config, self.reward)
        self.extra_metrics = {"method": method, "prompts": len(self.prompts)} | self.prompts.skipped
        if config.eval_prompts:
            reference = Reference(self.reference, self.as_reference)
            self.frontier = FrontierEvaluation(config, self, method, {tuple(i) for i in self.prompts.ids}, reference)
            self.frontier.learned = self.reward
        steps = f"{self.stream.steps} steps of {config.batch_size} episodes"
        log.say(f"{config.prompts}: {len(self.prompts)} prompts; {steps}")

    @property
    def saved_model(self) -> Any:
        return self.adapters or self.policy

    def _open_reference(self) -> tuple[Any, Callable[[], AbstractContextManager]]:
        """(reference, context in which it is the reference).

        With new adapters on --model it is that model without them; where --model is an adapter, a copy of that on the
        same frozen weights.
        """
        if self.adapters and self.config.reference == (self.config.model, self.config.revision):
            if is_adapter(resolve(self.config.model, self.config.revision, weights=False)):
                return setup.frozen_start(self.config, self.policy), nullcontext
            return self.policy, self.adapters.disable_adapter
        reference, tokenizer, _ = self.open_model(*self.config.reference)
        require_same_tokenizer(self.tokenizer, tokenizer, self.config.model, self.ref)
        return reference, nullcontext

    def _on_base(self, options: ScorerOptions) -> ScorerOptions:
        """The options, with a reward model whose adapter was trained on the policy's base kept apart from it.

        Policy, value and reward then share that base. With --quantize only a reward model that was trained so does.
        """
        spec, quantize = parse_scorer(self.config.reward), self.config.quantize
        if not self.adapters or spec.kind != "model":
            return options
        folder = resolve(spec.parts[0], self.config.reward_revision, weights=False)
        if not is_adapter(folder):
            return options
        base, policys = adapter_base.find(folder), self.adapters._dpoctl_base
        if base.weights_sha256 != policys.weights_sha256 or adapter_base.trained_in(folder) != quantize:
            return options
        log.say(f"{self.config.reward}: its adapters share the policy's base")
        return replace(options, apart=True, quantize=quantize)

    def _value_start(self) -> Any:
        """The reward model from which a separate value model starts, where its tokens are the policy's; else None."""
        config = self.config
        if config.value_model != "separate" or not isinstance(self.reward, RewardModelScorer):
            return None
        path, scorer = parse_scorer(config.reward).parts[0], self.reward.options
        model, _, codec = load_classifier(
            path,
            Place(quantize=scorer.quantize, quantized_at=self.compute.device, apart=scorer.apart),
            revision=config.reward_revision,
            trust_remote_code=config.scorer_trust_remote_code,
        )
        if not hasattr(model, "score") or codec.fingerprint != self.codec.fingerprint:
            log.say(f"{path}: its tokenizer is not the policy's, so the value model starts from the policy")
            return None
        settings = setup.lora_settings(config) if config.lora else None
        if settings and scorer.apart:
            settings = replace(settings, targets=lora.adapted_layers(self.policy))
            lora.add_to_attached(model, settings, config.reward)
            precision.hold(model, self.compute.dtype)
            shared_weights.share_frozen(model, [self.policy, self.reward.model])
        elif settings:
            lora.adapt(model, settings, config.reward, None)
            precision.hold(model, self.compute.dtype)
        return model

    # --- a step

    def step(self, step: int, trainer: Trainer) -> float:
        """One PPO step; returns the mean loss of its updates."""
        with self._timed("generating"):
            self.episodes = self.roll_out(step)
        with self._timed("scoring"):
            scores = self.score(self.episodes)
        with self._timed("log_probs"):
            self.experience, sums = self.collect(self.episodes, scores, step, trainer.last_good())
        with self._timed("learning"):
            loss = self.learn(step, trainer)
        trainer.meter.add_all(sums)
        self.state["flops"] += self._flops(self.episodes)
        return loss

    def roll_out(self, step: int) -> Episodes:
        """Sample a response to each prompt of the step; the pass over the prompts is k of the random numbers.

        Generation batches are dealt over the ranks, and every rank gets all episodes, in the prompts' order.
        """
        first = step * self.config.batch_size
        places = list(enumerate(self.stream.batch(step), start=first))
        groups = [(e, [i for _, i in g]) for e, g in groupby(places, key=lambda place: place[0] // self.stream.n)]
        batches = [(e, m[s]) for e, m in groups for s in batch_slices(len(m), 1, self.config.generation_batch_size)]
        every = map_shared(batches, lambda mine: [self._respond(epoch, members) for epoch, members in mine])
        return Episodes([row for batch in every for row in batch.rows], [s for batch in every for s in batch.sequences])

    def _respond(self, epoch: int, members: list[int]) -> Episodes:
        prompts = self.prompts.part(members)
        sampling = sampling_of(self.config, self.config.temperature, self.config.seed)
        with self.compute.autocast():
            responses = generate(self.policy, self.tokenizer, prompts.tokens(), [epoch], sampling)
        rows = completion_rows(prompts, responses)
        return Episodes(rows, sequences_of(rows))

    def score(self, episodes: Episodes) -> Tensor:
        """Rewards [B] float64; a response that did not end gets --missing-eos-penalty where it is given."""
        scores = torch.tensor(self.reward.score(episodes.rows).values, dtype=torch.float64)
        if self.config.missing_eos_penalty is not None:
            unfinished = torch.tensor([row["finish"] == "length" for row in episodes.rows])
            scores[unfinished] = self.config.missing_eos_penalty
        return scores

    @torch.no_grad()
    def collect(self, episodes: Episodes, scores: Tensor, step: int, hint: str) -> tuple[Experience, Sums]:
        """Log-probs and values of the sampling policy, the reference's log-probs; rewards, advantages, what is logged.

        Ranks share the forward passes; the rest every rank computes over the whole batch. Raises NumericalError, with
        `hint`, for a sequence KL above --max-kl.
        """
        config, coefficient = self.config, self.state["kl_coef"]
        mask = mask_of(episodes.lengths)
        logps, values, ref_logps, entropies = self._token_values(episodes, mask)
        log_ratios = (logps - ref_logps).double().sum(1)
        kl = log_ratios.mean().item()
        if not kl <= config.max_kl:
            raise NumericalError(
                f"step {step + 1}: the sequence KL is {kl:.1f}, above --max-kl {config.max_kl:g}",
                hint=f"{hint}; a larger --kl-coef or an adaptive --target-kl holds it",
            )
        rewards = ppo.token_rewards(logps, ref_logps, self._normalized(scores).float(), mask, coefficient)
        if config.whiten_rewards:
            rewards = ppo.whiten(rewards, mask, keep_mean=True)
        advantages, returns = ppo.gae(rewards, values, mask, config.gamma, config.lam)
        n, tokens = float(len(scores)), float(mask.sum())
        self.state["episodes"] += len(scores)
        sums: Sums = {
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
        return Experience(mask, logps, values, ppo.whiten(advantages, mask), returns), sums

    def _token_values(self, episodes: Episodes, mask: Tensor) -> list[Tensor]:
        """[log-probs, values, reference log-probs, entropies], each [B, T], of all ranks' forward passes."""
        groups = list(micro_batches(episodes.sequences, self.config.tokens_per_batch))
        mine, found = dealt(groups), []
        for indices in mine:
            batch = [episodes.sequences[i] for i in indices]
            with self.compute.autocast():
                logps, values, entropies, _ = self.model(batch, self.config.temperature, entropy=True)
                with self.as_reference():
                    ref_logps, _ = response_token_logps(self.reference, batch, self.config.temperature)
            found.append(torch.stack([x.float() for x in (logps, values, ref_logps, entropies)]))
        tensors = [torch.zeros(mask.shape) for _ in range(4)]
        if found:  # read from the device once
            parts = torch.cat(found, dim=1).cpu().split([int(mask[indices].sum()) for indices in mine], dim=1)
            for indices, part in zip(mine, parts, strict=True):
                for target, flat in zip(tensors, part, strict=True):
                    scatter(target, indices, mask, flat)
        for tensor in tensors:
            collectives.sum_over_ranks(tensor)  # each row is computed on one rank and 0 on the others
        return tensors

    def learn(self, step: int, trainer: Trainer) -> float:
        """The passes over the step's episodes, mini-batch by mini-batch; returns the mean loss."""
        config, size, losses = self.config, self.config.minibatch_size, []
        for epoch in range(config.ppo_epochs):
            order = permutation(config.seed, step * config.ppo_epochs + epoch, len(self.episodes.rows)).tolist()
            for start in range(0, len(order), size):
                members = order[start : start + size]
                listed_ids = listed(self.episodes.rows[i]["prompt_id"] for i in members)
                where = f"PPO step {step + 1}, pass {epoch + 1} (prompt_id {listed_ids})"
                losses.append(trainer.optimize(self._micro_batches(members), where))
        return sum(losses) / len(losses)

    def _micro_batches(self, members: list[int]) -> list[Micro]:
        """This rank's micro-batches of a mini-batch of episodes."""
        lengths, totals = self.episodes.lengths, [len(ids) for ids, _ in self.episodes.sequences]
        tokens = sum(lengths[i] for i in members)
        shared = share(members, totals.__getitem__, collectives.rank(), collectives.world_size())
        groups = pack(shared, totals.__getitem__, totals.__getitem__, self.config.tokens_per_batch)
        return [Micro(group, tokens, sum(totals[i] for i in group)) for group in groups]

    def loss(self, micro: Micro) -> tuple[Tensor, Sums]:
        """A micro-batch's share of the mini-batch's token mean: policy loss + vf_coef times the value loss."""
        config, experience, group = self.config, self.experience, micro.members
        mask = experience.mask[group]
        old_logps, old_values, advantages, returns = (
            to_device(t[group][mask], self.compute.device)
            for t in (experience.logps, experience.values, experience.advantages, experience.returns)
        )
        logps, values, _, _ = self.model([self.episodes.sequences[i] for i in group], config.temperature)
        policy, clipped = ppo.policy_loss(logps, old_logps, advantages, config.clip)
        value, value_clipped = ppo.value_loss(values, old_values, returns, config.value_clip)
        logged = {
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "policy/clipfrac_avg": clipped,
            "val/clipfrac_avg": value_clipped,
            "policy/approxkl_avg": 0.5 * (logps - old_logps) ** 2,
        }
        n = float(len(logps))
        sums: Sums = {name: (x.detach().double().sum(), n) for name, x in logged.items()}
        return (policy.sum() + config.vf_coef * value.sum()) / micro.minibatch_tokens, sums

    def dummy_loss(self) -> Tensor:
        logps, values, _, _ = self.model([([0, 0], 1)], self.config.temperature)
        return logps.sum() + values.sum()

    def tokens(self, micro: Micro) -> int:
        return micro.tokens

    def flops(self, micro: Micro) -> int:
        sequences = [self.episodes.sequences[i] for i in micro.members]
        policy, value = self.costs
        return policy.of_update(sequences) + (value.of_update(sequences, whole=True) if value else 0)

    def describe(self, step: int) -> str:
        return "prompt_id " + listed(self.prompts.rows[i]["prompt_id"] for i in self.stream.batch(step))

    # --- bookkeeping

    def timing(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken

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
        sizes = [quantized.count(m) for m in (self.policy, self.model, self.reference)]
        return 2 * tokens * sum(sizes)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        yield  # each part ends by reading results from the device
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - start


def method_name(config: TrainPPO, reward: Scorer) -> str:
    """The paper's families: PPO on a learned reward, on the ground truth, and with another system's settings."""
    family = "ppo" if reward.score_type == "reward" else "ppo-gt"
    return f"{family}-{config.preset}" if config.preset == "trl-2023" else family


def stream_of(config: TrainPPO, prompts: int) -> Stream:
    """Batches of prompts in the order of --seed."""
    return Stream(prompts, config.batch_size, config.epochs, config.max_steps, shuffled(config.seed, prompts))


def check_room(prompts: PromptSet, config: TrainPPO, context: int | None) -> None:
    """Raise InputError, with its prompt_id, for a prompt that leaves no room for a response of --max-new-tokens."""
    limit = min(config.max_length, context or config.max_length)
    for row, ids in zip(prompts.rows, prompts.ids, strict=True):
        if len(ids) + config.max_new_tokens > limit:
            raise InputError(
                f"{config.prompts}: prompt {row['prompt_id']}: {len(ids)} tokens and --max-new-tokens "
                f"{config.max_new_tokens} exceed the {limit} tokens of --max-length and the model's context",
                hint="a smaller --max-new-tokens or --max-prompt-length",
            )


def warn_of_reach(config: TrainPPO, steps: int) -> None:
    """Warn where the adaptive coefficient cannot move far enough in this run to reach the target KL."""
    if config.target_kl is None:
        return
    reach = (1.0 + 0.2 * config.batch_size / config.kl_horizon) ** steps
    if reach < 2.0:
        log.warn(
            f"--target-kl {config.target_kl:g} can hardly be reached: --kl-horizon {config.kl_horizon} lets the "
            f"coefficient grow by at most a factor of {reach:.2f} in {steps} steps of {config.batch_size} episodes. "
            "Start --kl-coef near its final value, or lower the horizon"
        )
