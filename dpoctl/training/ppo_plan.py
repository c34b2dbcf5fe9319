"""What --dry-run prints for train-ppo: steps, tokens, FLOPs, and the memory of policy, value model, reference, reward.

PPO's parts of a step hold different things: roll-outs a key cache, scoring the reward model's activations, learning the
gradients of policy and value model.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.ppo import TrainPPO
from ..config.scorer import parse_scorer
from ..data.readers import load_rows
from ..inference import memory
from ..inference.memory import Batch, Held, Phase, PlannedScorer
from ..models import ledger, lora, quantized, shared_weights
from ..models.flops import model_flops
from ..models.hub import is_adapter, resolve, resolve_base
from ..models.ledger import Ledger
from ..models.load import context_length, untrained
from ..models.logprobs import Sequences, response_token_logps
from ..models.rewards import ActorCritic, make_critic
from ..outputs import adapter_base
from . import ppo, setup
from .plan import Evaluated, TrainingPlan, evaluation_phase

_SHOWN = (
    "preset lr adam_eps schedule batch_size minibatch_size ppo_epochs kl_coef target_kl kl_horizon gamma lam clip "
    "value_clip vf_coef max_grad_norm normalize_rewards whiten_rewards missing_eos_penalty value_model temperature"
).split()


class PPOPlan(TrainingPlan):
    """The plan of train-ppo. Every episode is taken to be as long as the longest prompt and --max-new-tokens."""

    config: TrainPPO

    def __init__(self, config: TrainPPO):
        super().__init__(config)
        self.rows = load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows, columns=config.columns).rows
        self.width = memory.longest_prompt(self.rows, setup.codec_of(config), config.max_prompt_length)
        self.stream = ppo.stream_of(config, len(self.rows))
        self.steps = self.stream.steps

    def micros(self, config: TrainPPO, step: int) -> list[Sequences]:
        """The micro-batches of a mini-batch."""
        world = config.plan_world_size or 1
        episodes = self._batch(config, -(-min(config.minibatch_size, config.batch_size) // world))
        group = list(episodes.sequences(config.tokens_per_batch))
        return [group] * -(-episodes.rows // len(group))

    def loss(self, model: Any, sequences: Sequences) -> Tensor:
        logps, values, _, _ = model(sequences, 1.0)
        return logps.sum() + values.sum()

    def lines(self) -> dict[str, Any]:
        """What --dry-run prints."""
        config = self.config
        tokens = self.stream.total * config.max_new_tokens
        minibatches = -(-config.batch_size // config.minibatch_size)
        with ledger.planning(gpu=self.target.gpu):
            policy = self._build(config)
            weights, cost = quantized.count(policy), model_flops(policy)
        text = [([1] * (self.width + config.max_new_tokens), self.width)]
        # sampling and the three models' log-probs, and each pass's updates of policy and value model
        flops = self.stream.total * (4 * 2 * weights * len(text[0][0]) + 2 * config.ppo_epochs * cost.of_update(text))
        world = config.plan_world_size or 1
        shown = {name.replace("_", "-"): getattr(config, name) for name in _SHOWN} | {
            "reward's score type": config.score_type,
            "prompts": len(self.rows),
            "PPO steps": self.steps,
            "optimizer steps": self.steps * config.ppo_epochs * minibatches,
            "generated tokens at most": tokens,
            "parameters of the policy": weights,
            "FLOPs at most": f"{flops:.2e}",
            "devices": f"{world} ({config.parallel})" if world > 1 else 1,
        }
        return shown | self.memory_lines()

    def phases_of(self, config: TrainPPO, counted: Ledger, trained: Held) -> list[Phase]:
        """Roll-outs, scoring, log-probs and learning of a step, and a point of the frontier."""
        reference = self._open_reference(config, counted, trained)
        reward = memory.open_scorer(
            counted, config.reward, config.reward_revision, self.target, config.scorer_tokens_per_batch
        )
        if on_base := _on_base(config):
            reward = replace(reward, models=[_on_shared_base(counted, held, trained.model) for held in reward.models])
        before = counted.restart()
        critic = self._critic(config, trained.model)
        if on_base and critic.trunk is not None:
            shared_weights.share_frozen(critic.trunk, [trained.model], _same_shape)
        critic_size = trained.size + counted.restart() - before
        scorer = self._open_scorer(config, counted)
        others = {
            "reference": reference.size,
            "reward": reward.size,
            "scorer": scorer.size if scorer else 0,
        }
        learning = self._update_phase(config, counted, Held(critic, critic_size), None)
        held = {name: learning.parts[name] for name in ("weights", "optimizer")} | others
        phases = self._collecting(config, counted, critic, reference, reward, held)
        phases.append(Phase("learning", learning.parts | others))
        if scorer:
            del held["scorer"]
            phases.append(evaluation_phase(config, counted, Evaluated(trained.model, scorer, held), self))
        return phases

    def _collecting(
        self,
        config: TrainPPO,
        counted: Ledger,
        critic: ActorCritic,
        reference: Held,
        reward: PlannedScorer,
        held: dict[str, int],
    ) -> list[Phase]:
        batch = self._batch(config, config.generation_batch_size)
        batch = batch.within(context_length(critic.policy))

        def roll_out() -> int:
            with self.target.autocast():
                return memory.generate(critic.policy, batch)

        def log_probs() -> None:
            sequences = batch.sequences(config.tokens_per_batch)
            with torch.no_grad(), self.target.autocast():
                critic(sequences, 1.0, entropy=True)
                response_token_logps(reference.model, sequences)

        episodes = -(-config.batch_size // (config.plan_world_size or 1))
        return [
            memory.work(counted, "roll-outs", held, roll_out),
            memory.work(counted, "scoring", held, lambda: reward.run(episodes, batch.tokens)),
            memory.work(counted, "log-probs", held, log_probs),
        ]

    def _batch(self, config: TrainPPO, most: int) -> Batch:
        count = min(most, config.batch_size, len(self.rows))
        return Batch(count, count, self.width, config.max_new_tokens)

    def _open_reference(self, config: TrainPPO, counted: Ledger, trained: Held) -> Held:
        """The reference: with adapters on --model, that model without them."""
        if config.lora and config.reference == (config.model, config.revision):
            return Held(trained.model, 0)
        path, revision = config.reference
        return memory.open_frozen(counted, path, "policy", revision, self.target)

    def _critic(self, config: TrainPPO, policy: Any) -> ActorCritic:
        """Policy and value model, as `PPO` makes them; a value model from the reward model has its adapters."""
        reward_model = None
        spec = parse_scorer(config.reward)
        if config.value_model == "separate" and spec.kind == "model":
            path, revision = spec.parts[0], config.reward_revision

            def build() -> Any:
                model = untrained(path, "classifier", revision=revision)
                if config.lora and _is_reward(model):
                    lora.adapt(model, setup.lora_settings(config), path, None)
                return model

            found = ledger.fake(build, gpu=self.target.gpu)
            if _is_reward(found):
                reward_model = ledger.held(found, self.target.dtype)
        critic = make_critic(policy, config.value_model, reward_model)
        if critic.trunk is not None:
            ledger.assume(critic.trunk, gpu=self.target.gpu)
        return critic


def _on_base(config: TrainPPO) -> bool:
    """Whether the reward model's adapters will share the policy's base; here by its folder, in `PPO` by its content."""
    spec = parse_scorer(config.reward)
    if not config.lora or spec.kind != "model":
        return False
    folder = resolve(spec.parts[0], config.reward_revision, weights=False)
    if not is_adapter(folder) or adapter_base.trained_in(folder) != config.quantize:
        return False
    bases = {
        _base_of(spec.parts[0], folder),
        _base_of(config.model, resolve(config.model, config.revision, weights=False)),
    }
    return len(bases) == 1


def _base_of(path: str, folder: str) -> Path:
    """The folder of a model's weights, of adapters that of their base."""
    if not is_adapter(folder):
        return Path(folder).resolve()
    base = adapter_base.find(folder)
    return Path(resolve_base(path, base.path, base.revision, weights=False)).resolve()


def _on_shared_base(counted: Ledger, reward: Held, policy: Any) -> Held:
    """A reward model that holds the policy's base in place of its own."""
    before = counted.restart()
    shared_weights.share_frozen(reward.model, [policy], _same_shape)
    return Held(reward.model, reward.size - (before - counted.restart()))


def _same_shape(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape


def _is_reward(model: Any) -> bool:
    return hasattr(model, "score") and model.config.num_labels == 1
