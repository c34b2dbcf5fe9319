"""Options of the training commands."""

from dataclasses import dataclass
from typing import ClassVar

from .sampling import Generation
from .schema import option
from .shared import (
    DATA,
    DEVICES,
    EVAL,
    LOSS,
    OPT,
    PPO,
    RUN,
    SIEBERT,
    Common,
    Device,
)


@dataclass(frozen=True, kw_only=True)
class Training:
    epochs: float = option(1.0, "Passes over the data.", OPT, above=0)
    max_steps: int | None = option(None, "Stop after this many updates, whatever --epochs says.", OPT, at_least=1)
    warmup_steps: int = option(150, "Updates over which the learning rate rises linearly.", OPT, at_least=0)
    schedule: str = option(
        "constant", "Learning rate after the warm-up.", OPT, choices=("constant", "linear", "cosine")
    )
    weight_decay: float = option(0.0, "Decoupled with adamw, L2 with rmsprop.", OPT, at_least=0)
    tokens_per_batch: int = option(
        8192, "Tokens in one forward pass (padding counted); memory, not mathematics.", OPT, at_least=1, identity=False
    )
    max_length: int = option(512, "Longest prompt + completion, in tokens.", DATA, at_least=2)
    max_prompt_length: int = option(256, "Longest prompt; longer ones keep their end.", DATA, at_least=1)
    skip_bad_rows: bool = option(False, "Count and skip rows that are not as they should be.", DATA)
    eval_every: int | None = option(None, "Updates between evaluations; without it only at the end.", EVAL, at_least=1)
    log_every: int = option(10, "Updates between rows of metrics.jsonl.", RUN, at_least=1, identity=False)
    save_every: int = option(500, "Updates between checkpoints.", RUN, at_least=1, identity=False)
    keep_checkpoints: int = option(
        2, "Checkpoints kept when the run is complete; 0 keeps none.", RUN, at_least=0, at_most=2, identity=False
    )
    save_dtype: str = option(
        "float32", "Precision of the saved weights.", RUN, choices=("float32", "bfloat16", "float16")
    )
    log_to: str | None = option(
        None,
        "Also log to tensorboard or wandb (extras of the package).",
        RUN,
        choices=("tensorboard", "wandb"),
        identity=False,
    )

    parallel: str = option(
        "ddp",
        "Under torchrun: ddp holds the whole model on every device, fsdp shards weights, gradients and optimizer.",
        DEVICES,
        choices=("ddp", "fsdp"),
        identity=False,
    )
    rank_timeout: float = option(
        10.0, "Under torchrun: minutes without an answer of another rank after which the run stops.", DEVICES,
        above=0, identity=False,
    )  # fmt: skip
    activation_checkpointing: bool = option(
        False, "Keep only the blocks' inputs and compute the rest again going back: less memory, a third more time.",
        DEVICES, identity=False,
    )  # fmt: skip

    plan_world_size: int | None = option(
        None, "With --dry-run: devices that the plan is for.", DEVICES, at_least=1, identity=False
    )

    lora: int | None = option(
        None, "Train adapters of this rank on a frozen model, and save them alone (needs peft).", DEVICES, at_least=1
    )
    lora_alpha: float | None = option(
        None, "The adapters' output is scaled by alpha / rank (default: alpha is twice the rank).", DEVICES, above=0
    )
    lora_targets: str | None = option(
        None,
        "Layers that get adapters, by name, with commas (default: all-linear, all but head and embeddings).",
        DEVICES,
    )

    def shared_problems(self) -> list[str]:
        """What is wrong with the options that all training stages have."""
        found = self.length_problems()
        if self.parallel == "fsdp" and getattr(self, "eval_prompts", None):
            found.append(
                "--eval-prompts needs the whole policy on every device: --parallel ddp, or evaluate the saved run"
            )
        if self.plan_world_size and not self.dry_run:
            found.append("--plan-world-size means nothing without --dry-run: torchrun says how many devices there are")
        if not self.lora:
            given = {"--lora-alpha": self.lora_alpha, "--lora-targets": self.lora_targets}
            found += [f"{flag} means nothing without --lora" for flag, value in given.items() if value]
        return found

    def length_problems(self) -> list[str]:
        if self.max_prompt_length < self.max_length:
            return []
        return [f"--max-prompt-length {self.max_prompt_length} leaves no room within --max-length {self.max_length}"]


@dataclass(frozen=True, kw_only=True)
class Frontier(Generation):
    """Points of the reward-KL frontier during training."""

    eval_prompts: str | None = option(
        None, "Prompts for points of the reward-KL frontier (eval.jsonl).", EVAL, input="file"
    )
    eval_limit: int | None = option(256, "Use the first so many of those prompts.", EVAL, at_least=1)
    scorer: str = option(SIEBERT, "Reward of those points.", EVAL, input="scorer")
    score_text: str = option(
        "joined", "Score prompt and completion joined, or the completion alone.", EVAL, choices=("joined", "completion")
    )

    keep_samples: bool = option(
        False, "Keep the completions of those points too, with their step (samples.jsonl): what judge can read.", EVAL
    )

    def frontier_problems(self) -> list[str]:
        alone = self.keep_samples and not self.eval_prompts
        return ["--keep-samples means nothing without --eval-prompts, whose completions it keeps"] if alone else []

    def frontier_inputs(self, inputs: list) -> list:
        """Without evaluation prompts nothing is scored, so the scorer is no input."""
        return inputs if self.eval_prompts else [i for i in inputs if i[0] != "scorer"]


@dataclass(frozen=True, kw_only=True)
class SFT(Frontier, Training, Device, Common):
    model: str = option(help="Model to fine-tune: directory or hub id.", input="model")
    data: str = option(help="Text rows, prompt + completion rows, or preferences with --field.", input="file")
    eval_data: str | None = option(None, "Held-out rows for the loss.", EVAL, input="file")
    field: str | None = option(
        None, "Train on this side of preferences (chosen: Preferred-FT).", DATA, choices=("chosen", "rejected")
    )
    overlong: str = option(
        "truncate", "What to do with texts over --max-length.", DATA, choices=("truncate", "drop", "split")
    )
    ref: str | None = option(None, "Reference of the KL at --eval-prompts (default: --model).", EVAL, input="model")
    lr: float = option(1e-5, "Learning rate.", OPT, above=0)
    batch_size: int = option(32, "Rows per update, over all devices.", OPT, at_least=1)
    optimizer: str = option("adamw", "Optimizer.", OPT, choices=("adamw", "rmsprop"))
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", OPT, above=0)

    def problems(self) -> list[str]:
        return self.shared_problems() + self.frontier_problems()


@dataclass(frozen=True, kw_only=True)
class TrainDPO(Frontier, Training, Device, Common):
    model: str = option(help="Policy to start from, usually the SFT model.", input="model")
    ref: str | None = option(None, "Reference (default: --model).", input="model")
    data: str = option(help="Preference rows.", input="file")
    eval_data: str | None = option(None, "Held-out preference rows.", EVAL, input="file")
    loss: str = option(
        "sigmoid",
        "Objective; sigmoid is DPO.",
        LOSS,
        choices=(
            "sigmoid",
            "robust",
            "ipo",
            "ipo-mean",
            "hinge",
            "rpo",
            "dpop",
            "sigmoid-norm",
            "simpo",
            "orpo",
            "kto",
            "unlikelihood",
        ),
    )
    beta: float = option(0.1, "Strength of the pull to the reference (tau for ipo).", LOSS, above=0)
    label_smoothing: float | None = option(
        None, "Assumed share of flipped labels (sigmoid, robust).", LOSS, at_least=0, at_most=0.4999
    )
    alpha: float | None = option(None, "Weight of the second term (rpo, unlikelihood).", LOSS, at_least=0)
    gamma: float | None = option(None, "SimPO's target margin.", LOSS, at_least=0)
    lambda_: float | None = option(None, "Weight of the second term (dpop, orpo).", LOSS, at_least=0, flag="--lambda")
    lambda_chosen: float | None = option(None, "KTO's weight of chosen completions.", LOSS, at_least=0)
    lambda_rejected: float | None = option(None, "KTO's weight of rejected completions.", LOSS, at_least=0)
    shuffle: str = option(
        "prompts",
        "Shuffle prompts, so that a prompt's pairs share their forwards, or pairs.",
        OPT,
        choices=("prompts", "pairs"),
    )
    cache_dir: str | None = option(
        None,
        "Where reference log-probs are kept for the next run (default: the user's cache folder).",
        RUN,
        identity=False,
        metavar="DIR",
    )
    lr: float = option(1e-6, "Learning rate.", OPT, above=0)
    batch_size: int = option(64, "Pairs per update, over all devices.", OPT, at_least=1)
    optimizer: str = option("rmsprop", "Optimizer.", OPT, choices=("rmsprop", "adamw"))
    max_grad_norm: float = option(10.0, "Gradients are scaled down to this norm.", OPT, above=0)

    def problems(self) -> list[str]:
        return self.shared_problems() + self.frontier_problems() + self.loss_problems()

    def loss_problems(self) -> list[str]:
        """Options that the chosen loss does not read would do nothing: refused."""
        read = LOSS_OPTIONS[self.loss]
        flags = {
            "label_smoothing": "--label-smoothing",
            "alpha": "--alpha",
            "gamma": "--gamma",
            "lambda_": "--lambda",
            "lambda_chosen": "--lambda-chosen",
            "lambda_rejected": "--lambda-rejected",
        }
        return [
            f"{flag} means nothing to --loss {self.loss}"
            for name, flag in flags.items()
            if getattr(self, name) is not None and name not in read
        ]


LOSS_OPTIONS = {  # what each loss reads beside beta; a test holds it to objectives/preference.py
    "sigmoid": ("label_smoothing",),
    "robust": ("label_smoothing",),
    "ipo": (),
    "ipo-mean": (),
    "hinge": (),
    "rpo": ("alpha",),
    "dpop": ("lambda_",),
    "sigmoid-norm": (),
    "simpo": ("gamma",),
    "orpo": ("lambda_",),
    "kto": ("lambda_chosen", "lambda_rejected"),
    "unlikelihood": ("alpha",),
}


@dataclass(frozen=True, kw_only=True)
class TrainRM(Training, Device, Common):
    model: str = option(help="Base or SFT model whose trunk the reward model starts from.", input="model")
    data: str = option(help="Preference rows.", input="file")
    eval_data: str | None = option(None, "Held-out preference rows.", EVAL, input="file")
    validation: float = option(
        0.1, "Share of the prompts held out where there is no --eval-data.", EVAL, above=0, at_most=0.5
    )
    select: str = option(
        "best", "Keep the weights of the best validation accuracy, or the last.", EVAL, choices=("best", "last")
    )
    use_margins: bool = option(False, "Ask for each row's `margin` between the rewards of its pair.", LOSS)
    normalize: str = option(
        "shift",
        "Let the rewards of the reference's completions average 0, and have a standard deviation of 1.",
        LOSS,
        choices=("none", "shift", "shift-scale"),
    )
    reference_completions: str | None = option(
        None, "Completions of the reference for --normalize (default: those of the preferences).", LOSS, input="file"
    )
    epochs: float = option(3.0, "Passes over the data.", OPT, above=0)
    lr: float = option(1e-5, "Learning rate.", OPT, above=0)
    batch_size: int = option(64, "Pairs per update, over all devices.", OPT, at_least=1)
    optimizer: str = option("adamw", "Optimizer.", OPT, choices=("adamw", "rmsprop"))
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", OPT, above=0)

    def problems(self) -> list[str]:
        found = self.shared_problems()
        if self.reference_completions and self.normalize == "none":
            found.append("--reference-completions means nothing to --normalize none")
        return found


@dataclass(frozen=True, kw_only=True)
class TrainPPO(Frontier, Training, Device, Common):
    model: str = option(help="Policy to start from, usually the SFT model.", input="model")
    ref: str | None = option(None, "Reference of the KL penalty (default: --model).", input="model")
    prompts: str = option(help="Prompt rows to complete.", input="file")
    reward: str = option(help="What is maximised.", input="scorer")
    preset: str | None = option(
        None, "Published hyper-parameters, set together; --dry-run shows them.", PPO, choices=("paper", "trl-2023")
    )
    target_kl: float | None = option(
        None, "Sequence KL that an adaptive coefficient steers to, in nats; without it the coefficient is fixed.", PPO,
        above=0,
    )  # fmt: skip
    kl_coef: float = option(0.2, "Coefficient of the KL penalty, or where the adaptive one starts.", PPO, at_least=0)
    kl_horizon: int = option(10000, "Episodes over which the adaptive coefficient moves.", PPO, at_least=1)
    max_kl: float = option(50.0, "A sequence KL above this is a runaway: the run stops.", PPO, above=0)
    ppo_epochs: int = option(4, "Passes over each step's episodes.", PPO, at_least=1)
    minibatch_size: int = option(64, "Episodes per optimizer step.", PPO, at_least=1)
    clip: float = option(0.2, "Probability ratios count within 1 - clip to 1 + clip.", PPO, above=0)
    value_clip: float = option(0.2, "Values move at most this far from their old ones.", PPO, above=0)
    vf_coef: float = option(0.1, "Weight of the value loss.", PPO, at_least=0)
    gamma: float = option(1.0, "Discount.", PPO, above=0, at_most=1)
    lam: float = option(0.95, "GAE's lambda.", PPO, at_least=0, at_most=1)
    whiten_rewards: bool = option(False, "Divide the per-token rewards by their standard deviation.", PPO)
    normalize_rewards: bool = option(False, "Normalise scores by the mean and deviation of all scores so far.", PPO)
    missing_eos_penalty: float | None = option(
        None, "Score of a response that never ended, in place of the reward's.", PPO
    )
    value_model: str = option(
        "separate", "A model of its own (the reward model's trunk where there is one), or a head on the policy's trunk.",
        PPO, choices=("separate", "shared"),
    )  # fmt: skip
    lr: float = option(1e-5, "Learning rate.", OPT, above=0)
    warmup_steps: int = option(0, "Steps over which the learning rate rises linearly.", OPT, at_least=0)
    schedule: str = option("linear", "Learning rate after the warm-up.", OPT, choices=("constant", "linear", "cosine"))
    batch_size: int = option(256, "Episodes per PPO step.", OPT, at_least=2)
    optimizer: str = option("adamw", "Optimizer.", OPT, choices=("adamw", "rmsprop"))
    adam_eps: float = option(1e-5, "Adam's epsilon.", OPT, above=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 leaves them.", OPT, at_least=0)
    log_every: int = option(1, "PPO steps between rows of metrics.jsonl.", RUN, at_least=1, identity=False)
    save_every: int = option(20, "PPO steps between checkpoints.", RUN, at_least=1, identity=False)

    PRESETS: ClassVar[dict[str, dict]] = {  # PAPER: of the paper's own runs, and of TRL's example in 2023
        "paper": {
            "batch_size": 1024,
            "normalize_rewards": True,
            "kl_coef": 0.2,
            "kl_horizon": 10000,
            "target_kl": 6.0,
        },
        "trl-2023": {
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
        },
    }
    PRESET_OPEN: ClassVar[tuple[str, ...]] = ("target_kl",)  # what both families sweep

    @property
    def score_type(self) -> str:
        """How a classifier's output is the reward, where --reward leaves it open."""
        return "logit" if self.preset == "trl-2023" else "prob"

    def problems(self) -> list[str]:
        found = self.shared_problems() + self.frontier_problems()
        if self.parallel != "ddp":
            found.append("PPO generates with the whole policy on every device: --parallel ddp")
        if self.plan_world_size:
            found.append("--plan-world-size means nothing to train-ppo, whose plan does not tell the memory")
        if self.temperature == 0 or self.top_p < 1 or self.top_k > 0:
            found.append(
                "PPO learns from the distribution that it samples: --temperature above 0, --top-p 1 and --top-k 0 (a cut "
                "distribution makes the KL read negative)"
            )
        if self.minibatch_size > self.batch_size:
            found.append(f"--minibatch-size {self.minibatch_size} is more than --batch-size {self.batch_size}")
        if self.target_kl is None and self.kl_horizon != 10000:
            found.append("--kl-horizon means nothing without --target-kl: the coefficient is fixed")
        if self.target_kl is not None and self.kl_coef == 0:
            found.append("--kl-coef 0 stays 0 whatever --target-kl says")
        if self.optimizer != "adamw" and self.adam_eps != 1e-5:
            found.append(f"--adam-eps means nothing to --optimizer {self.optimizer}")
        if self.preset == "trl-2023" and self.reward.endswith(("@prob", "@log-odds")):
            found.append(f"--preset trl-2023 rewards the positive logit, --reward {self.reward} contradicts it")
        return found
