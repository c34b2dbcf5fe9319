"""Options of train-dpo."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..objectives.catalogue import (
    ALWAYS_UNPAIRED,
    OBJECTIVES,
    Traits,
    canonical,
    defaults_of,
    having,
    parse_loss,
    reading,
    traits_of,
)
from .conditions import When, all_of, any_of, given, not_given, one_of
from .schema import amended, option
from .shared import DATA, EVAL, EVAL_PROMPTS, LOSS, OPT, RUN
from .training import EVALUATED, OPTIMIZER_HELP, OPTIMIZERS, Balanced, Frontier, Selection, WithReference

VOTES = "votes"  # what --soft-labels takes in place of a number
SCORE_TYPES = ("prob", "logit", "log-odds", "reward", "implicit", "python")


def _loss(holds: Callable[[Traits], bool], help: str) -> When:
    """With losses that have a trait; of a sum, with one term that has it."""
    return When(lambda c: holds(traits_of(c.loss)), lambda c: f"with --loss {c.loss}", help)


def _one_of(names: tuple[str, ...]) -> str:
    return f"with --loss {names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' or ' + names[-1]}"


def _reads(name: str) -> When:
    return _loss(lambda traits: name in traits.options, _one_of(reading(name)))


def _takes(flag: str) -> When:
    return _loss(lambda traits: getattr(traits, flag), _one_of(having(flag)))


_WITH_REFERENCE = _loss(lambda traits: traits.needs_reference, "with losses that have a reference")
_PAIR_BY_PAIR = _loss(lambda traits: not traits.needs_ranks, f"without {_one_of(having('needs_ranks'))[5:]}")
_UNPAIRED_ROWS = When(
    lambda c: c.is_unpaired,
    lambda c: f"with --loss {c.loss}" + (" and without --unpaired" if c.loss == "kto" else ""),
    "with --unpaired, or with --loss bco or apo_zero_unpaired",
)
_SOFT_BY_SCORES = When(
    lambda c: c.soft_labels not in (None, VOTES), lambda c: "without --soft-labels TAU", "with --soft-labels TAU"
)
_REFERENCE = any_of(_WITH_REFERENCE, EVAL_PROMPTS)


@amended(
    ref={"when": _REFERENCE},
    ref_revision={"when": replace(all_of(_REFERENCE, given("ref")), help="with --ref")},
    eval_every={"when": EVALUATED},
    select={"when": EVALUATED, "help": "Keep the last weights, or those of the best evaluation (see --select-by)."},
)
@dataclass(frozen=True, kw_only=True)
class TrainDPO(Selection, Balanced, WithReference, Frontier):
    model: str = option(help="Policy to start from, usually the SFT model.", panel=DATA, input="model")
    data: tuple[str, ...] = option(
        help="Preference rows; may be given several times.", panel=DATA, input="file", several=True
    )
    eval_data: tuple[str, ...] = option(
        (), "Held-out preference rows; may be given several times.", EVAL, input="file", several=True
    )
    select_by: str = option(
        "loss",
        "What --select best reads: the lowest loss or the highest accuracy on --eval-data, or the highest reward of "
        "--eval-prompts.",
        EVAL,
        choices=("loss", "accuracy", "reward"),
        when=one_of("select", "best"),
    )
    select_kl: float | None = option(
        None,
        "Select among the evaluations whose KL to the reference is at most this, in nats per sequence.",
        EVAL,
        above=0,
        metavar="NATS",
        when=one_of("select_by", "reward"),
    )
    loss: str = option(
        "sigmoid",
        "Objective; sigmoid is DPO. A weighted sum: sigmoid:0.8,bco_pair:0.2,sft:1. See dpoctl docs losses.",
        LOSS,
        choices=(*OBJECTIVES, *ALWAYS_UNPAIRED),
        summed=canonical,
        synonyms={"dpo": "DPO's loss is sigmoid", "cdpo": "cDPO is sigmoid with --label-smoothing"},
    )
    beta: float = option(
        0.1, "Strength of the KL constraint: larger stays closer to the reference (ipo: tau).", LOSS, above=0
    )
    label_smoothing: float | None = option(
        None,
        f"Assumed share of flipped labels ({defaults_of('label_smoothing')}).",
        LOSS,
        at_least=0,
        at_most=0.4999,
        when=_reads("label_smoothing"),
    )
    alpha: float | None = option(
        None,
        f"Weight of the NLL term or of the unlikelihood term ({defaults_of('alpha')}).",
        LOSS,
        at_least=0,
        when=_reads("alpha"),
    )
    gamma: float | None = option(
        None,
        f"SimPO's target reward margin ({defaults_of('gamma')}).",
        LOSS,
        at_least=0,
        when=_reads("gamma"),
    )
    lambda_: float | None = option(
        None,
        f"Weight of the penalty or of the odds-ratio term ({defaults_of('lambda_')}).",
        LOSS,
        at_least=0,
        flag="--lambda",
        when=_reads("lambda_"),
    )
    lambda_chosen: float | None = option(
        None,
        f"KTO's weight of chosen completions ({defaults_of('lambda_chosen')}).",
        LOSS,
        at_least=0,
        when=_reads("lambda_chosen"),
    )
    lambda_rejected: float | None = option(
        None,
        f"KTO's weight of rejected completions ({defaults_of('lambda_rejected')}).",
        LOSS,
        at_least=0,
        when=_reads("lambda_rejected"),
    )
    unpaired: bool = option(
        False,
        "Rows are single completions with a `label`, not pairs; bco and apo_zero_unpaired always read such rows.",
        LOSS,
        when=one_of("loss", "kto"),
    )
    threshold: float | None = option(
        None,
        "Completions are desirable whose `label`, or else `score`, is at least this (default: the label is true).",
        LOSS,
        when=_UNPAIRED_ROWS,
    )
    discopop_tau: float | None = option(
        None,
        f"DiscoPOP's temperature of the modulation ({defaults_of('discopop_tau')}).",
        LOSS,
        above=0,
        when=_reads("discopop_tau"),
    )
    soft_labels: float | str | None = option(
        None,
        "Soft labels: the chosen completion is better with probability sigmoid((chosen_score - rejected_score) / TAU); "
        "votes: with the row's `chosen_share`.",
        LOSS,
        words=(VOTES,),
        above=0,
        metavar=f"TAU|{VOTES}",
        when=_takes("takes_labels"),
    )
    score_type: str | None = option(
        None,
        "Scale of the rows' scores (default: what the manifest of --data says). Probabilities are trained on only "
        "where this says prob.",
        LOSS,
        choices=SCORE_TYPES,
        when=any_of(_takes("needs_scores"), _SOFT_BY_SCORES),
    )
    use_weights: bool = option(
        False,
        "Weight each row's loss by its `weight`, divided by the mean weight of the rows.",
        LOSS,
        when=_PAIR_BY_PAIR,
    )
    wpo: bool = option(
        False,
        "WPO: weight each pair by how probable its completions are for the policy, as a constant (2406.11827).",
        LOSS,
        when=_PAIR_BY_PAIR,
    )
    f_divergence: str = option(
        "reverse-kl",
        "Divergence from the reference that the objective penalises (f-DPO, 2309.16240).",
        LOSS,
        choices=("reverse-kl", "forward-kl", "js", "alpha"),
        when=_takes("takes_divergence"),
    )
    f_alpha: float = option(
        0.5,
        "Of the alpha divergence: near 0 it is the reverse KL, near 1 the forward KL.",
        LOSS,
        above=0,
        at_most=1,
        when=one_of("f_divergence", "alpha"),
    )
    ld_alpha: float | None = option(
        None,
        "Weight of the tokens beyond the length of the shorter completion (LD-DPO, 2409.06411); 1 is plain.",
        LOSS,
        at_least=0,
        at_most=1,
        when=_takes("takes_ld"),
    )
    sync_ref_every: int | None = option(
        None,
        "Updates between two moves of the reference towards the policy (TR-DPO, 2404.09656).",
        LOSS,
        at_least=1,
        when=_WITH_REFERENCE,
    )
    sync_ref_mix: float = option(
        0.6,
        "Share of the policy's weights in the reference after a move; 1 replaces it.",
        LOSS,
        above=0,
        at_most=1,
        when=given("sync_ref_every"),
    )
    shuffle: str = option(
        "prompts",
        "What to shuffle: prompts (faster: a prompt's pairs share forward passes) or single pairs.",
        OPT,
        choices=("prompts", "pairs"),
    )
    cache_dir: str | None = option(
        None,
        "Where log-probabilities of the reference are cached for later runs (default: the user's cache).",
        RUN,
        identity=False,
        metavar="DIR",
        when=replace(all_of(_WITH_REFERENCE, not_given("sync_ref_every")), help="with a reference that does not move"),
    )
    lr: float = option(1e-6, "Learning rate.", OPT, above=0)
    batch_size: int = option(64, "Pairs per update, over all devices.", OPT, at_least=1)
    optimizer: str = option("rmsprop", OPTIMIZER_HELP, OPT, choices=OPTIMIZERS)
    max_grad_norm: float = option(10.0, "Gradients are clipped to this norm.", OPT, above=0)

    @property
    def is_unpaired(self) -> bool:
        """Whether rows are single completions with a label."""
        return self.loss in ALWAYS_UNPAIRED or (self.loss == "kto" and self.unpaired)

    def check_select_by(self) -> Iterator[str]:
        if self.is_unpaired and self.select == "best" and self.select_by == "accuracy":
            yield "--select-by accuracy ranks the completions of a pair, and these rows have one each: use loss"
        if self.select == "best":
            needed = "--eval-prompts" if self.select_by == "reward" else "--eval-data"
            if not (self.eval_prompts if self.select_by == "reward" else self.eval_data):
                yield f"--select-by {self.select_by} needs {needed}"

    def check_select_kl(self) -> Iterator[str]:
        plain = self.temperature > 0 and self.top_p == 1 and self.top_k == 0
        if self.select_kl is not None and not plain:
            yield "--select-kl: samples at temperature 0, or with --top-p or --top-k, have no KL"

    def check_unpaired(self) -> Iterator[str]:
        for name, asked in (("--wpo", self.wpo), ("--ld-alpha", self.ld_alpha is not None)):
            if asked and self.is_unpaired:
                yield f"{name} compares the completions of a pair, and these rows have one each"

    def check_smoothing(self) -> Iterator[str]:
        if "exo_pair" in _names(self.loss) and self.label_smoothing == 0:
            yield "--label-smoothing 0: exo_pair needs labels that are not certain, such as 0.001"

    def check_divergence(self) -> Iterator[str]:
        for name in _names(self.loss):
            traits = OBJECTIVES[name]
            if self.f_divergence != "reverse-kl" and traits.needs_reference and not traits.takes_divergence:
                yield f"--f-divergence {self.f_divergence}: {name} is defined for the reverse KL alone"

    def check_ld_alpha(self) -> Iterator[str]:
        for name in _names(self.loss):
            if self.ld_alpha is not None and not OBJECTIVES[name].takes_ld and name != "sft":
                yield f"--ld-alpha: {name} does not compare sums of token log-probs"

    def check_sync_ref(self) -> Iterator[str]:
        if self.sync_ref_every and self.lora:
            yield "--sync-ref-every moves all weights of a reference, and --lora trains adapters alone: leave one out"


def _names(loss: str) -> list[str]:
    return [] if loss in ALWAYS_UNPAIRED else [name for name, _ in parse_loss(loss)]
