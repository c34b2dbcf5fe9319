"""Proximal policy optimisation of a policy on any reward, with a KL penalty to its reference."""

from contextlib import nullcontext

from .. import log
from ..config.scorer import parse_scorer
from ..config.training import TrainPPO
from ..data.batching import Stream, shuffled
from ..data.schema import load_rows
from ..data.tokens import fingerprint
from ..inference import policy_evaluation
from ..inference.scorers import Scorer, load_scorer
from ..models import lora
from ..models.load import context_length, load_classifier
from ..models.rewards import make_critic
from ..outputs import claims
from ..training import loop, ppo, setup


def run(config: TrainPPO, output: claims.Output) -> None:
    device, dtype = setup.open_device(config, output)
    policy, tokenizer = setup.open_model(config, config.model, device)
    ref = config.ref or config.model
    adapters = setup.adapt(config, policy)
    if adapters and ref == config.model:  # the frozen weights are the reference's
        reference, as_reference = policy, adapters.disable_adapter
    else:
        (reference, other), as_reference = setup.open_model(config, ref, device), nullcontext
        setup.same_tokenizer(tokenizer, other, config.model, ref)
    reward = load_scorer(
        config.reward,
        device=str(device),
        revision=config.revision,
        text=config.score_text,
        score_type=config.score_type,
    )
    prompts = load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows)
    ids = _prompt_ids(config, prompts, tokenizer)
    ppo.check_room(prompts.path, ids, prompts.lines, config, context_length(policy))
    stream = _stream(config, len(ids))
    ppo.warn_of_reach(config, stream.steps)
    start = _reward_model(config, reward, tokenizer)
    if config.lora and start is not None:
        lora.adapt(start, config, config.reward, None)
    critic = make_critic(policy, config.value_model, start)
    trainer = ppo.Trainer(
        config, critic, reference, as_reference, tokenizer, reward, prompts.rows, ids, stream, device, dtype
    )
    method = method_name(config, reward)
    task = loop.Task(
        steps=stream.steps,
        count="episodes",
        epoch=stream.epoch,
        update=trainer.step,
        tokens=lambda micro: micro[2],
        where=lambda step: "prompt_id " + loop.listed(prompts.rows[i]["prompt_id"] for i in stream.batch(step)),
        point=setup.frontier_point(
            config, policy, tokenizer, device, dtype, method, ref, {tuple(i) for i in ids}, learned=reward
        ),
        saved=adapters or policy,
        state=trainer.state,
        timing=trainer.take_seconds,
        notes={"method": method, "prompts": len(ids)} | prompts.skipped,
    )
    log.say(f"{config.prompts}: {len(ids)} prompts; {stream.steps} steps of {config.batch_size} episodes")
    loop.train(critic, tokenizer, task, config, output, device, dtype)


def method_name(config: TrainPPO, reward: Scorer) -> str:
    """The paper's families: PPO on a learned reward, on the ground truth, and with another system's settings."""
    family = "ppo" if reward.score_type == "reward" else "ppo-gt"
    return f"{family}-{config.preset}" if config.preset == "trl-2023" else family


def _stream(config: TrainPPO, prompts: int) -> Stream:
    return Stream(prompts, config.batch_size, config.epochs, config.max_steps, shuffled(config.seed, prompts))


def _prompt_ids(config: TrainPPO, prompts, tokenizer) -> list[list[int]]:
    """Prompts' ids, at most --max-prompt-length of them: BOS and end are kept."""
    return policy_evaluation.prompt_ids(
        prompts.rows, tokenizer, None, prompts.path, prompts.lines, config.max_prompt_length
    )


def _reward_model(config: TrainPPO, reward: Scorer, tokenizer):
    """The reward model whose trunk the value function starts from, where its tokens are the policy's."""
    if config.value_model != "separate" or reward.score_type != "reward":
        return None
    path = parse_scorer(config.reward).parts[0]
    model, own = load_classifier(path, revision=config.revision)
    if not hasattr(model, "score") or fingerprint(own) != fingerprint(tokenizer):
        log.say(f"{path}: other tokens than the policy's, so the value model starts from the policy")
        return None
    return model


def plan(config: TrainPPO) -> dict:
    rows = load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows)
    stream = _stream(config, len(rows.rows))
    weights = setup.count_weights(config)
    names = (
        "preset lr adam_eps schedule batch_size minibatch_size ppo_epochs kl_coef target_kl kl_horizon gamma lam clip "
        "value_clip vf_coef max_grad_norm normalize_rewards whiten_rewards missing_eos_penalty value_model temperature"
    ).split()
    shown = {name.replace("_", "-"): getattr(config, name) for name in names}
    tokens = stream.total * config.max_new_tokens
    return shown | {
        "reward reading": config.score_type,
        "prompts": len(rows.rows),
        "PPO steps": stream.steps,
        "optimizer steps": stream.steps * config.ppo_epochs * -(-config.batch_size // config.minibatch_size),
        "generated tokens at most": tokens,
        "parameters of the policy": weights,
        "FLOPs at most": f"{weights * tokens * (2 * 4 + 6 * 2 * config.ppo_epochs):.2e}",
    }
