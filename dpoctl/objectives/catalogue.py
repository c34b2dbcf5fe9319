"""The preference objectives by name: what each reads and needs. Importable without torch, for the command line."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Traits:
    """The options that an objective reads besides beta, with their defaults, and what it needs from its caller.

    `needs_batch_mean`: the mean of c and r over the global batch. A loss that is not `bounded_below` can be driven down
    without limit by a policy that gives up on the rejected completions: training watches for it.
    """

    options: dict[str, float] = field(default_factory=dict)
    needs_reference: bool = True
    needs_batch_mean: bool = False
    bounded_below: bool = True


OBJECTIVES: dict[str, Traits] = {
    "sigmoid": Traits({"label_smoothing": 0.0}),
    "robust": Traits({"label_smoothing": 0.1}, bounded_below=False),
    "ipo": Traits(),
    "ipo-mean": Traits(),
    "hinge": Traits(),
    "rpo": Traits({"alpha": 1.0}),
    "dpop": Traits({"lambda_": 50.0}),
    "sigmoid-norm": Traits(),
    "simpo": Traits({"gamma": 1.0}, needs_reference=False),
    "orpo": Traits({"lambda_": 0.1}, needs_reference=False),
    "kto": Traits({"lambda_chosen": 1.0, "lambda_rejected": 1.0}, needs_batch_mean=True),
    "unlikelihood": Traits({"alpha": 0.1}, needs_reference=False, bounded_below=False),
}


def reading(option: str) -> tuple[str, ...]:
    """The names of the objectives that read an option."""
    return tuple(name for name, traits in OBJECTIVES.items() if option in traits.options)


def defaults_of(option: str) -> str:
    """An option's defaults for a help page: `default: 1`, or by objective: `default: rpo 1, unlikelihood 0.1`."""
    found = {name: f"{traits.options[option]:g}" for name, traits in OBJECTIVES.items() if option in traits.options}
    if len(set(found.values())) == 1:
        return f"default: {next(iter(found.values()))}"
    return f"default: {', '.join(f'{name} {value}' for name, value in found.items())}"
