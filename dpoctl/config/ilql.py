"""Options of train-ilql."""

from collections.abc import Iterator
from dataclasses import dataclass

from .conditions import given
from .schema import amended, option
from .shared import DATA, EVAL, LOSS, OPT
from .training import OPTIMIZER_HELP, OPTIMIZERS, Balanced, Training


@amended(eval_every={"when": given("eval_data")})
@dataclass(frozen=True, kw_only=True)
class TrainILQL(Balanced, Training):
    model: str = option(help="Policy to start from, usually the SFT model.", panel=DATA, input="model")
    data: tuple[str, ...] = option(
        help="Completions with scores, or preferences with --rows; may be given several times.",
        panel=DATA,
        input="file",
        several=True,
    )
    eval_data: tuple[str, ...] = option(
        (), "Held-out rows for the losses; may be given several times.", EVAL, input="file", several=True
    )
    rows: str = option(
        "completions",
        "What --data holds: completions, whose return is `score`, or preferences, 1 for chosen and -1 for rejected.",
        DATA,
        choices=("completions", "preferences"),
    )
    normalize: str = option(
        "standard",
        "Returns as they are, or standardised: mean 0 and standard deviation 1 over the training data.",
        LOSS,
        choices=("none", "standard"),
    )
    tau: float = option(
        0.7,
        "Expectile of Q that V estimates; 0.5 is the mean, higher is nearer the best token.",
        LOSS,
        above=0,
        at_most=0.9999,
    )
    gamma: float = option(0.99, "Discount of the return per token.", LOSS, at_least=0, at_most=1)
    cql_coef: float = option(
        0.1, "Weight of the conservative term, the cross-entropy of Q over the vocabulary.", LOSS, at_least=0
    )
    sft_coef: float = option(
        1.0, "Weight of the policy's own loss: cross-entropy on all completions.", LOSS, at_least=0
    )
    target_rate: float = option(
        0.005,
        "Share of the Q heads that an update of their targets (a moving average) takes.",
        LOSS,
        above=0,
        at_most=1,
    )
    target_every: int = option(1, "Updates between updates of the targets.", LOSS, at_least=1)
    lr: float = option(5e-5, "Learning rate.", OPT, above=0)
    batch_size: int = option(128, "Completions per update, over all devices.", OPT, at_least=1)
    optimizer: str = option("adamw", OPTIMIZER_HELP, OPT, choices=OPTIMIZERS)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", OPT, above=0)

    def check_parallel(self) -> Iterator[str]:
        if self.parallel == "fsdp":
            yield "--parallel fsdp would not shard the Q heads, which are the larger part: --parallel ddp"
