"""Options of train-ppo, and its presets of published hyper-parameters."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .conditions import ALWAYS, all_of, any_of, given, one_of
from .sampling import generation_when
from .schema import amended, option
from .scorer import parse_scorer
from .shared import DATA, EVAL_PROMPTS, GEN, OPT, PPO, RUN, names_models
from .training import OPTIMIZER_HELP, OPTIMIZERS, Frontier, WithReference

# The hyper-parameters of the paper's PPO runs (2305.18290, appendix), and those of TRL's example of 2023.
_PAPER = {"batch_size": 1024, "normalize_rewards": True, "kl_coef": 0.2, "kl_horizon": 10000, "target_kl": 6.0}
_TRL_2023 = {
    "lr": 1.41e-5,
    "adam_eps": 1e-8,
    "batch_size": 256,
    "minibatch_size": 16,
    "ppo_epochs": 4,
    "kl_coef": 0.2,
    "target_kl": 6.0,
    "kl_horizon": 10000,
    "gamma": 1.0,
    "lam": 0.95,
    "clip": 0.2,
    "value_clip": 0.2,
    "vf_coef": 0.1,
    "schedule": "constant",
    "warmup_steps": 0,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "normalize_rewards": False,
    "whiten_rewards": False,
}


_SCORING = replace(
    any_of(names_models("reward"), all_of(EVAL_PROMPTS, names_models("scorer"))),
    help="with models as --reward or --scorer",
)


@amended(
    **generation_when(ALWAYS),
    score_text={"when": ALWAYS, "panel": GEN},
    scorer_trust_remote_code={
        "help": "Run code that comes with a scorer or reward from the Hub.",
        "when": _SCORING,
    },
    scorer_tokens_per_batch={"when": _SCORING},
    eval_every={"when": EVAL_PROMPTS},
)
@dataclass(frozen=True, kw_only=True)
class TrainPPO(WithReference, Frontier):
    model: str = option(help="Policy to start from, usually the SFT model.", panel=DATA, input="model")
    prompts: str = option(help="Prompt rows to complete.", panel=DATA, input="file")
    reward: str = option(help="The reward that is maximised.", panel=DATA, input="scorer")
    reward_revision: str | None = option(
        None, "Branch, tag or commit of --reward on the Hub.", DATA, metavar="REVISION", when=names_models("reward")
    )
    preset: str | None = option(
        None, "Published hyper-parameters, set together; --dry-run shows them.", PPO, choices=("paper", "trl-2023")
    )
    target_kl: float | None = option(
        None,
        "Sequence KL in nats that an adaptive coefficient steers towards (default: a fixed coefficient).",
        PPO,
        above=0,
    )
    kl_coef: float = option(0.2, "Coefficient of the KL penalty, or the start of the adaptive one.", PPO, at_least=0)
    kl_horizon: int = option(
        10000, "Episodes over which the adaptive coefficient moves.", PPO, at_least=1, when=given("target_kl")
    )
    max_kl: float = option(50.0, "Stop the run when the sequence KL exceeds this.", PPO, above=0)
    ppo_epochs: int = option(4, "Passes over each step's episodes.", PPO, at_least=1)
    minibatch_size: int = option(64, "Episodes per optimizer step.", PPO, at_least=1)
    clip: float = option(0.2, "Probability ratios are clipped to 1 - clip .. 1 + clip.", PPO, above=0)
    value_clip: float = option(0.2, "Values are clipped to this distance from their old ones.", PPO, above=0)
    vf_coef: float = option(0.1, "Weight of the value loss.", PPO, at_least=0)
    gamma: float = option(1.0, "Discount.", PPO, above=0, at_most=1)
    lam: float = option(0.95, "Lambda of GAE.", PPO, at_least=0, at_most=1)
    whiten_rewards: bool = option(False, "Divide the per-token rewards by their standard deviation.", PPO)
    normalize_rewards: bool = option(False, "Normalise scores by the mean and deviation of all scores so far.", PPO)
    missing_eos_penalty: float | None = option(
        None, "Score of a response that did not end, in place of the reward's.", PPO
    )
    value_model: str = option(
        "separate",
        "A separate model (with --lora: its own adapters), started from the reward model where there is one, or a head "
        "on the policy's trunk.",
        PPO,
        choices=("separate", "shared"),
    )
    lr: float = option(1e-5, "Learning rate.", OPT, above=0)
    warmup_steps: int = option(0, "Steps over which the learning rate rises linearly.", OPT, at_least=0)
    schedule: str = option("linear", "Learning rate after the warm-up.", OPT, choices=("constant", "linear", "cosine"))
    batch_size: int = option(256, "Episodes per PPO step.", OPT, at_least=2)
    optimizer: str = option("adamw", OPTIMIZER_HELP, OPT, choices=OPTIMIZERS)
    adam_eps: float = option(1e-5, "Epsilon of Adam.", OPT, above=0, when=one_of("optimizer", "adamw", "adamw-8bit"))
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 does not clip.", OPT, at_least=0)
    log_every: int = option(1, "PPO steps between rows of metrics.jsonl.", RUN, at_least=1, identity=False)
    save_every: int = option(20, "PPO steps between checkpoints.", RUN, at_least=1, identity=False)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": _PAPER, "trl-2023": _TRL_2023}
    PRESET_OPEN: ClassVar[tuple[str, ...]] = ("target_kl",)  # swept in both

    @property
    def score_type(self) -> str:
        """What a classifier's reward is, where --reward leaves it open."""
        return "logit" if self.preset == "trl-2023" else "prob"

    def check_parallel(self) -> Iterator[str]:
        if self.parallel != "ddp":
            yield "PPO generates with the full policy on every device: --parallel ddp"

    def check_distribution(self) -> Iterator[str]:
        if self.temperature == 0 or self.top_p < 1 or self.top_k > 0:
            yield (
                "PPO learns from the distribution that it samples: --temperature above 0, --top-p 1 and --top-k 0 "
                "(with a truncated distribution the KL comes out negative)"
            )

    def check_minibatch(self) -> Iterator[str]:
        if self.minibatch_size > self.batch_size:
            yield f"--minibatch-size {self.minibatch_size} is more than --batch-size {self.batch_size}"

    def check_kl(self) -> Iterator[str]:
        if self.target_kl is not None and self.kl_coef == 0:
            yield "--kl-coef 0 stays 0 whatever --target-kl is"

    def check_preset(self) -> Iterator[str]:
        types = {spec.score_type for spec in parse_scorer(self.reward).each}
        if self.preset == "trl-2023" and types & {"prob", "log-odds"}:
            yield f"--preset trl-2023 uses the positive logit as reward, which --reward {self.reward} contradicts"
