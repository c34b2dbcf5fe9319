"""The base class of what a training stage trains: a model, batches of data, a loss, and what to measure."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batching import Stream
from ..data.chats import Prompt
from ..inference.options import template_options
from ..models.flops import model_flops
from ..models.load import Loaded
from ..models.logprobs import Sequences
from ..outputs.claims import Output
from ..runtime import collectives
from . import setup
from .balance import Balance, coefficient_of
from .frontier import FrontierEvaluation
from .metrics import Sums
from .options import BatchOptions, TrainingOptions

if TYPE_CHECKING:
    from .loop import Trainer


class Task(ABC):
    """One training run as the loop sees it.

    The constructor opens the device, the model with its adapters, and shards it; a subclass then reads its data and
    sets `stream`.

    Attributes: `unit` names what a batch counts; `select` names the metric of evaluations whose best weights are saved
    (empty: the last weights), the lowest value where it is a `loss`, and `patience` after how many evaluations without
    a better value the run ends (None: at its last update); `most_kl` is the largest KL to the reference of a point of
    the frontier that may be selected; `updates` is how many a run that has ended made; `has_held_out` says whether
    `evaluate` is called; `finalizes` whether `finalize` forwards data, so that a checkpoint is saved before it; `state`
    is saved and restored with checkpoints; `extra_metrics` go into the manifest; `frontier` measures points of the
    reward-KL frontier (None without --eval-prompts); `next_command` is what the closing summary suggests.
    """

    config: TrainingOptions  # a subclass reads more of its command's config
    unit = "examples"
    select = ""
    patience: int | None = None
    most_kl: float | None = None
    updates = 0
    finalizes = False
    adapter_task = "CAUSAL_LM"
    next_command = ""

    def __init__(self, config: TrainingOptions, output: Output):
        self.config, self.output = config, output
        self.compute = setup.open_training(config, output)
        self.templates = template_options(config, output)
        self.model, self.tokenizer, self.codec = self.load_model()
        self.policy = self.model  # what generates at points of the frontier
        self.adapters = setup.adapt(config, self.model, self.adapter_task)
        setup.place(config, self.model, self.compute)
        self.stream: Stream
        self.has_held_out = self.trains_chats = False
        self.frontier: FrontierEvaluation | None = None
        self.state: dict[str, Any] = {}
        self.extra_metrics: dict[str, Any] = {}

    @property
    def ends(self) -> frozenset[int]:
        """The ids at which sampling from the trained model stops."""
        return self.codec.stops_of(Prompt([] if self.trains_chats else ""))

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run goes on from updates of an earlier start. Called on every rank."""
        folder = Path(self.config.out) / "checkpoints"
        return collectives.from_rank_0(self.output.resuming and any(folder.glob("step-*")))

    @property
    def saved_model(self) -> Any:
        """The model of the run directory: the adapters alone where only they are trained."""
        return self.adapters or self.model

    def load_model(self) -> Loaded:
        """The model to train, of --model; with --lora, an adapter is still apart from it."""
        return setup.open_trained(self.config, self.compute, self.templates)

    def open_model(self, path: str, revision: str | None) -> Loaded:
        """A causal language model on this run's device that is not trained, such as the reference."""
        return setup.open_frozen(self.config, self.compute, path, revision, self.templates)

    @property
    def further_tensors(self) -> dict[str, Tensor]:
        """Tensors that updates change in place and checkpoints hold beside the trained weights, such as averages."""
        return {}

    # --- an update

    @abstractmethod
    def step(self, step: int, trainer: "Trainer") -> float:
        """Update number `step` (0-based), by one optimizer step or several; returns the loss to log."""

    @abstractmethod
    def loss(self, micro: Any) -> tuple[Tensor, Sums]:
        """(loss, sums to log) of a micro-batch, both on the device: neither is waited for.

        The loss is the micro-batch's share of the global mean: the losses of all micro-batches and ranks add up to it.
        """

    @abstractmethod
    def dummy_loss(self) -> Tensor:
        """A loss that reaches all weights, for ranks that have fewer micro-batches than others under FSDP."""

    @abstractmethod
    def tokens(self, micro: Any) -> int:
        """Tokens that a micro-batch forwards."""

    @abstractmethod
    def flops(self, micro: Any) -> int:
        """FLOPs of a micro-batch's forward and backward pass, as `models.flops` counts them."""

    @abstractmethod
    def describe(self, step: int) -> str:
        """The batch of update `step` (0-based) in words, for an error message."""

    # --- around the updates

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data; called only where `has_held_out` is set."""
        return {}

    def on_log(self, row: dict[str, float]) -> None:  # noqa: B027  (a hook)
        """Looks at each row of metrics.jsonl; may warn, or raise NumericalError."""

    def timing(self) -> dict[str, float]:
        """Seconds by part of a step since the last call, for timing.jsonl."""
        return {}

    def save_more(self, dtype: torch.dtype) -> list[Path]:
        """Save what the run directory holds beside the model, and return the files; called on rank 0 alone."""
        return []

    def finalize(self) -> dict[str, Any]:
        """Called with the weights that will be saved; may change them, and returns metrics for the manifest.

        A task that `finalizes` may raise Interrupted here, on every rank.
        """
        return {}


class BatchTask(Task):
    """A task whose update is one optimizer step on the micro-batches of a batch of rows.

    `balance` adds the load-balancing loss of mixtures of experts.
    """

    config: BatchOptions
    whole = False  # rewards are read at last tokens, without a head over the vocabulary

    def __init__(self, config: BatchOptions, output: Output):
        super().__init__(config, output)
        self.cost = model_flops(self.model)
        self.balance = Balance(self.model, coefficient_of(self.model, config.router_aux_loss_coef))

    @abstractmethod
    def texts(self, micro: Any) -> tuple[Sequences, list[float]]:
        """(the sequences that a micro-batch forwards, how often each is counted by its loss)."""

    @abstractmethod
    def micro_batches(self, step: int) -> list:
        """This rank's micro-batches of update `step` (0-based)."""

    def flops(self, micro: Any) -> int:
        return self.cost.of_update(self.texts(micro)[0], whole=self.whole)

    def step(self, step: int, trainer: "Trainer") -> float:
        micros = self.micro_batches(step)
        self.balance.begin(self, micros)
        return trainer.optimize(micros, f"update {step + 1} ({self.describe(step)})")


def listed(rows: Iterable, most: int = 32) -> str:
    """The rows of a batch, by their lines or ids, as an error message names them."""
    rows = list(rows)
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")
