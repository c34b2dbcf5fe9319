"""Align a policy by PPO with a KL penalty to its reference (2305.18290, section 6 and appendix)."""

from ..config.ppo import TrainPPO
from ..data.readers import load_rows
from ..models.load import count_weights
from ..outputs.claims import Output
from ..training import loop, ppo

_SHOWN = (
    "preset lr adam_eps schedule batch_size minibatch_size ppo_epochs kl_coef target_kl kl_horizon gamma lam clip "
    "value_clip vf_coef max_grad_norm normalize_rewards whiten_rewards missing_eos_penalty value_model temperature"
).split()


def run(config: TrainPPO, output: Output) -> None:
    """Train and save the run directory."""
    loop.train(ppo.PPO(config, output))


def plan(config: TrainPPO) -> dict:
    """What --dry-run prints."""
    rows = load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows, columns=config.columns)
    stream = ppo.stream_of(config, len(rows.rows))
    weights = count_weights(config.model, config.revision)
    tokens = stream.total * config.max_new_tokens
    minibatches = -(-config.batch_size // config.minibatch_size)
    return {name.replace("_", "-"): getattr(config, name) for name in _SHOWN} | {
        "reward's score type": config.score_type,
        "prompts": len(rows.rows),
        "PPO steps": stream.steps,
        "optimizer steps": stream.steps * config.ppo_epochs * minibatches,
        "generated tokens at most": tokens,
        "parameters of the policy": weights,
        "FLOPs at most": f"{weights * tokens * (2 * 4 + 6 * 2 * config.ppo_epochs):.2e}",
    }
