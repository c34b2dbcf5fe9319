"""Options that the training commands share, and those of sft and train-rm."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .conditions import all_of, any_of, given, not_given, one_of
from .sampling import Generation, Rows, generation_when
from .schema import amended, like, option
from .shared import (
    DATA,
    DEVICES,
    EVAL,
    EVAL_PROMPTS,
    LOSS,
    OPT,
    RUN,
    SAVE_DTYPES,
    SIEBERT,
    ChatTemplates,
    Common,
    ModelOptions,
    Planned,
    Seeded,
    WithScorer,
    names_models,
)

OPTIMIZERS = ("adamw", "rmsprop", "adamw-8bit")
OPTIMIZER_HELP = "Optimizer; adamw-8bit keeps its state in 8 bits (needs bitsandbytes)."
EVALUATED = any_of(given("eval_data"), EVAL_PROMPTS)


@dataclass(frozen=True, kw_only=True)
class Training(Planned, Rows, ChatTemplates, ModelOptions, Seeded, Common):
    """What all training commands have."""

    plan_world_size: int | None = option(
        None,
        "Plan for this many devices (default: the ranks of torchrun, or 1).",
        DEVICES,
        at_least=1,
        identity=False,
        when=given("dry_run"),
    )

    epochs: float = option(1.0, "Passes over the data.", OPT, above=0)
    max_steps: int | None = option(None, "Stop after N updates, whatever --epochs says.", OPT, at_least=1)
    warmup_steps: int = option(150, "Updates over which the learning rate rises linearly.", OPT, at_least=0)
    schedule: str = option(
        "constant", "Learning rate after the warm-up.", OPT, choices=("constant", "linear", "cosine")
    )
    weight_decay: float = option(
        0.0, "Weight decay: decoupled with adamw, an L2 penalty with rmsprop.", OPT, at_least=0
    )
    max_length: int = option(512, "Longest prompt + completion, in tokens.", DATA, at_least=2)
    max_prompt_length: int = option(
        256, "Longest prompt, in tokens; longer ones are truncated from the left.", DATA, at_least=1
    )
    eval_every: int | None = option(
        None, "Updates between evaluations; by default only after the last update.", EVAL, at_least=1
    )
    log_every: int = option(10, "Updates between rows of metrics.jsonl.", RUN, at_least=1, identity=False)
    save_every: int = option(500, "Updates between checkpoints.", RUN, at_least=1, identity=False)
    keep_checkpoints: int = option(
        2, "Checkpoints kept when the run is complete; 0 keeps none.", RUN, at_least=0, at_most=2, identity=False
    )
    save_dtype: str = option("float32", "Precision of the saved weights.", RUN, choices=SAVE_DTYPES)
    log_to: str | None = option(
        None,
        "Also log to TensorBoard or Weights & Biases; needs the extra of that name.",
        RUN,
        choices=("tensorboard", "wandb"),
        identity=False,
    )

    tokens_per_batch: int = option(
        8192,
        "Most tokens in one forward pass, padding included; affects memory and speed, results only by rounding.",
        DEVICES,
        at_least=1,
        identity=False,
    )
    activation_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass: less memory, about a third more time.",
        DEVICES,
        identity=False,
    )
    parallel: str = option(
        "ddp",
        "Under torchrun: ddp holds the full model on every device, fsdp shards weights, gradients and optimizer.",
        DEVICES,
        choices=("ddp", "fsdp"),
        identity=False,
    )
    rank_timeout: float = option(
        10.0,
        "Under torchrun: stop after this many minutes without an answer from another rank.",
        DEVICES,
        above=0,
        identity=False,
    )
    lora: int | None = option(
        None,
        "Train LoRA adapters of rank N on the frozen model and save only them; those of an adapter as --model are "
        "continued (needs peft).",
        DEVICES,
        at_least=1,
    )
    lora_alpha: float | None = option(
        None,
        "LoRA alpha; adapters are scaled by alpha / rank (default: twice the rank, or that of the adapter --model).",
        DEVICES,
        above=0,
        when=given("lora"),
    )
    lora_targets: str | None = option(
        None,
        "Layers that get adapters, by name, separated by commas (default: all linear layers).",
        DEVICES,
        when=given("lora"),
    )
    use_dora: bool = option(
        False,
        "DoRA: adapt the magnitude and the direction of weights apart (2402.09353).",
        DEVICES,
        when=given("lora"),
    )
    use_rslora: bool = option(
        False, "Scale the adapters by alpha / sqrt(rank) in place of alpha / rank.", DEVICES, when=given("lora")
    )
    quantize: str | None = option(
        None,
        "Hold the frozen weights under the adapters in 4 bits (NF4, as QLoRA) or 8 (needs bitsandbytes).",
        DEVICES,
        choices=("4bit", "8bit"),
        when=given("lora"),
    )

    def check_quantize(self) -> Iterator[str]:
        if self.quantize and self.parallel == "fsdp":
            yield f"--quantize {self.quantize} holds the whole model on every device: --parallel ddp"

    def check_lengths(self) -> Iterator[str]:
        if self.max_prompt_length >= self.max_length:
            prompt, total = self.max_prompt_length, self.max_length
            yield f"--max-prompt-length {prompt} leaves no room within --max-length {total}"

    def check_optimizer(self: Any) -> Iterator[str]:
        if self.optimizer == "adamw-8bit" and self.parallel == "fsdp":
            yield "--optimizer adamw-8bit cannot be sharded: --parallel ddp, or --optimizer adamw with fsdp"


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """A training command whose loss may contain the load-balancing loss of a mixture of experts."""

    router_aux_loss_coef: float | None = option(
        None,
        "Mixtures of experts: weight of the load-balancing loss (default: the model's router_aux_loss_coef where its "
        "configuration has output_router_logits, else 0).",
        LOSS,
        at_least=0,
    )


@amended(
    **generation_when(EVAL_PROMPTS),
    score_text={"when": EVAL_PROMPTS},
    scorer_revision={"when": all_of(EVAL_PROMPTS, names_models("scorer"))},
    scorer_trust_remote_code={"when": all_of(EVAL_PROMPTS, names_models("scorer"))},
    scorer_tokens_per_batch={"when": all_of(EVAL_PROMPTS, names_models("scorer"))},
)
@dataclass(frozen=True, kw_only=True)
class Frontier(WithScorer, Generation, Training):
    """A training command that measures points of the reward-KL frontier."""

    eval_prompts: str | None = option(
        None, "Prompts to complete at each evaluation; reward and KL go to eval.jsonl.", EVAL, input="file"
    )
    eval_limit: int | None = option(256, "Use only the first N of --eval-prompts.", EVAL, at_least=1, when=EVAL_PROMPTS)
    scorer: str = option(SIEBERT, "Reward that --eval-prompts measures.", EVAL, input="scorer", when=EVAL_PROMPTS)
    keep_samples: bool = option(
        False,
        "Also write the completions of --eval-prompts to samples.jsonl, for judge.",
        EVAL,
        when=EVAL_PROMPTS,
    )


@dataclass(frozen=True, kw_only=True)
class WithReference:
    """A command with a reference model, which is --model where --ref is not given."""

    ref: str | None = option(None, "Reference model (default: --model).", DATA, input="model")
    ref_revision: str | None = option(
        None, "Branch, tag or commit of --ref on the Hub.", DATA, metavar="REVISION", when=given("ref")
    )

    @property
    def reference(self: Any) -> tuple[str, str | None]:
        """(path or hub id, revision) of the reference."""
        return (self.ref, self.ref_revision) if self.ref else (self.model, self.revision)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A command that may keep the weights of its best evaluation on held-out rows."""

    select: str = option(
        "last",
        "Keep the last weights, or those of the best evaluation on --eval-data.",
        EVAL,
        choices=("last", "best"),
        when=given("eval_data"),
    )
    patience: int | None = option(
        None,
        "End the run after N evaluations in a row without a better one.",
        EVAL,
        at_least=1,
        when=one_of("select", "best"),
    )


@amended(
    ref={
        "help": "Reference model for the KL of --eval-prompts (default: --model).",
        "panel": EVAL,
        "when": EVAL_PROMPTS,
    },
    ref_revision={"panel": EVAL, "when": all_of(EVAL_PROMPTS, given("ref"))},
    eval_every={"when": EVALUATED},
)
@dataclass(frozen=True, kw_only=True)
class SFT(Selection, Balanced, WithReference, Frontier):
    model: str = option(help="Model to fine-tune.", panel=DATA, input="model")
    data: tuple[str, ...] = option(
        help="Text rows, prompt + completion rows, or preferences with --field; may be given several times.",
        panel=DATA,
        input="file",
        several=True,
    )
    eval_data: tuple[str, ...] = option(
        (), "Held-out rows for the loss; may be given several times.", EVAL, input="file", several=True
    )
    field: str | None = option(
        None, "Train on this side of the preference pairs (chosen: Preferred-FT).", DATA, choices=("chosen", "rejected")
    )
    answers: str = option(
        "all",
        "Which of a chat's answers to train on: all of the assistant's, or the last.",
        DATA,
        choices=("all", "last"),
        when=not_given("field"),
    )
    overlong: str = option(
        "truncate", "What to do with texts over --max-length.", DATA, choices=("truncate", "drop", "split")
    )
    lr: float = option(1e-5, "Learning rate.", OPT, above=0)
    batch_size: int = option(32, "Rows per update, over all devices.", OPT, at_least=1)
    optimizer: str = option("adamw", OPTIMIZER_HELP, OPT, choices=OPTIMIZERS)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", OPT, above=0)


@amended(eval_every={"help": "Updates between evaluations (default: four per epoch)."})
@dataclass(frozen=True, kw_only=True)
class TrainRM(Balanced, Training):
    model: str = option(help="Base or SFT model that the reward model starts from.", panel=DATA, input="model")
    data: tuple[str, ...] = option(
        help="Preference rows; may be given several times.", panel=DATA, input="file", several=True
    )
    eval_data: tuple[str, ...] = option(
        (), "Held-out preference rows; may be given several times.", EVAL, input="file", several=True
    )
    validation: float = option(
        0.1, "Share of the prompts to hold out for validation.", EVAL, above=0, at_most=0.5, when=not_given("eval_data")
    )
    select: str = option(
        "best", "Keep the weights with the best validation accuracy, or the last.", EVAL, choices=("best", "last")
    )
    patience: int | None = like(Selection, "patience")
    by: str | None = option(
        None,
        "Also tell the held-out accuracy for each value of this column of the rows, such as subset.",
        EVAL,
        metavar="COLUMN",
    )
    use_margins: bool = option(
        False, "Use each row's `margin` in the loss: -log sigmoid(r_chosen - r_rejected - margin).", LOSS
    )
    center_rewards: float = option(
        0.0,
        "Add this times the mean of (r_chosen + r_rejected)^2 to the loss, which keeps rewards near 0 (2312.09244).",
        LOSS,
        at_least=0,
        metavar="COEF",
    )
    normalize: str = option(
        "shift",
        "Normalise rewards over the reference's completions: mean 0, with shift-scale also standard deviation 1.",
        LOSS,
        choices=("none", "shift", "shift-scale"),
    )
    reference_completions: str | None = option(
        None,
        "Completions of the reference (default: those of the preferences).",
        LOSS,
        input="file",
        when=one_of("normalize", "shift", "shift-scale"),
    )
    epochs: float = option(3.0, "Passes over the data.", OPT, above=0)
    lr: float = option(1e-5, "Learning rate.", OPT, above=0)
    batch_size: int = option(64, "Pairs per update, over all devices.", OPT, at_least=1)
    optimizer: str = option("adamw", OPTIMIZER_HELP, OPT, choices=OPTIMIZERS)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", OPT, above=0)
