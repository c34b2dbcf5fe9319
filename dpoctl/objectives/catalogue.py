"""The preference objectives by name: what each reads and needs. Importable without torch, for the command line."""

from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True)
class Traits:
    """The options that an objective reads besides beta, with their defaults, and what it needs from its caller.

    `needs_batch_mean`: the mean of c and r over the global batch. `needs_running_mean`: the same over all updates so
    far. `needs_ranks`: what has the same rank in the global batch. `needs_scores`: the scores of both completions.
    `takes_labels`: the probability of a pair's label may be the pair's own (soft labels). `takes_divergence`: it reads
    c and r through D alone, whose log-ratios another f-divergence may replace. `takes_ld`: it compares sums of token
    log-probs, in which tokens beyond the shorter completion may count less. A loss that is not `bounded_below` can be
    driven down without limit by a policy that gives up on the rejected completions: training watches for it.
    """

    options: dict[str, float] = field(default_factory=dict)
    needs_reference: bool = True
    needs_batch_mean: bool = False
    needs_running_mean: bool = False
    needs_ranks: bool = False
    needs_scores: bool = False
    takes_labels: bool = False
    takes_divergence: bool = False
    takes_ld: bool = False
    bounded_below: bool = True


OBJECTIVES: dict[str, Traits] = {
    "sigmoid": Traits({"label_smoothing": 0.0}, takes_labels=True, takes_divergence=True, takes_ld=True),
    "robust": Traits(
        {"label_smoothing": 0.1}, takes_labels=True, bounded_below=False, takes_divergence=True, takes_ld=True
    ),
    "ipo": Traits(takes_divergence=True, takes_ld=True),
    "ipo-mean": Traits(),
    "hinge": Traits(takes_divergence=True, takes_ld=True),
    "rpo": Traits({"alpha": 1.0}, takes_labels=True, takes_divergence=True, takes_ld=True),
    "dpop": Traits({"lambda_": 50.0}, takes_ld=True),
    "sigmoid-norm": Traits(),
    "simpo": Traits({"gamma": 1.0}, needs_reference=False),
    "orpo": Traits({"lambda_": 0.1}, needs_reference=False),
    "kto": Traits({"lambda_chosen": 1.0, "lambda_rejected": 1.0}, needs_batch_mean=True, takes_ld=True),
    "unlikelihood": Traits({"alpha": 0.1}, needs_reference=False, bounded_below=False),
    "distill": Traits(needs_scores=True, takes_divergence=True),
    "exo_pair": Traits({"label_smoothing": 0.001}, takes_labels=True, takes_divergence=True, takes_ld=True),
    "nca_pair": Traits(takes_ld=True),
    "bco_pair": Traits(needs_running_mean=True, takes_ld=True),
    "sppo_hard": Traits(takes_ld=True),
    "aot": Traits({"label_smoothing": 0.0}, needs_ranks=True, takes_ld=True),
    "aot_unpaired": Traits({"label_smoothing": 0.0}, needs_ranks=True, takes_ld=True),
    "apo_zero": Traits(takes_ld=True),
    "apo_down": Traits(takes_ld=True),
    "discopop": Traits({"discopop_tau": 0.05}, takes_divergence=True, takes_ld=True),
    "sft": Traits(needs_reference=False),
}

_WEIGHTS = {"lambda_chosen": 1.0, "lambda_rejected": 1.0}
UNPAIRED: dict[str, Traits] = {  # on single completions with a label
    "kto": Traits(_WEIGHTS, needs_batch_mean=True),
    "bco": Traits(_WEIGHTS, needs_running_mean=True),
    "apo_zero_unpaired": Traits(_WEIGHTS),
}
ALWAYS_UNPAIRED = tuple(name for name in UNPAIRED if name not in OBJECTIVES)

_FLAGS = [name for name, default in Traits().__dict__.items() if isinstance(default, bool)]
_OF_ALL = ("bounded_below",)  # holds for a sum where it holds for every term; the others where it does for one


def parse_loss(text: str) -> tuple[tuple[str, float], ...]:
    """(name, weight) of each term of `NAME` or of a sum `NAME:WEIGHT,...`; a term without a weight has 1.

    `-` and `_` in names are the same. Raises ValueError, in words, for another notation, an unknown name, a weight that
    is not a positive number, and a name that is given twice.
    """
    terms: list[tuple[str, float]] = []
    for item in text.split(","):
        given, colon, number = (part.strip() for part in item.partition(":"))
        name = next((known for known in OBJECTIVES if known.replace("-", "_") == given.replace("-", "_")), given)
        if name not in OBJECTIVES:
            raise ValueError(f"{given!r} is not one of {', '.join(OBJECTIVES)}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = float("nan")
        if not 0 < weight < float("inf"):
            raise ValueError(f"{item.strip()!r}: expected NAME or NAME:WEIGHT, with a weight above 0")
        if name in (known for known, _ in terms):
            raise ValueError(f"{name} is given twice")
        terms.append((name, weight))
    return tuple(terms)


def canonical(text: str) -> str:
    """The notation with names as the catalogue has them. Raises ValueError as `parse_loss` does."""
    parse_loss(text)
    parts = [item.partition(":") for item in text.split(",")]
    names = [name for name, _ in parse_loss(text)]
    return ",".join(name + colon + number.strip() for name, (_, colon, number) in zip(names, parts, strict=True))


@lru_cache
def traits_of(text: str) -> Traits:
    """The traits of a loss or of a sum: it needs, takes and reads what one of its terms does."""
    if text in ALWAYS_UNPAIRED:
        return UNPAIRED[text]
    terms = [OBJECTIVES[name] for name, _ in parse_loss(text)]
    options = {option: value for traits in terms for option, value in traits.options.items()}
    held = {flag: (all if flag in _OF_ALL else any)(getattr(t, flag) for t in terms) for flag in _FLAGS}
    return terms[0] if len(terms) == 1 else Traits(options, **held)


def having(flag: str) -> tuple[str, ...]:
    """The names of the objectives that have a trait, such as `takes_labels`."""
    return tuple(name for name, traits in OBJECTIVES.items() if getattr(traits, flag))


def reading(option: str) -> tuple[str, ...]:
    """The names of the objectives that read an option."""
    return tuple(name for name, traits in (OBJECTIVES | UNPAIRED).items() if option in traits.options)


def defaults_of(option: str) -> str:
    """An option's defaults for a help page: `default: 1`, or by objective: `default: rpo 1, unlikelihood 0.1`."""
    found = {name: f"{traits.options[option]:g}" for name, traits in OBJECTIVES.items() if option in traits.options}
    if len(set(found.values())) == 1:
        return f"default: {next(iter(found.values()))}"
    return f"default: {', '.join(f'{name} {value}' for name, value in found.items())}"
