"""The preference objectives by name: what each reads and asks for. Without torch, so that the command line knows them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What an objective reads besides beta, and what it asks of its caller.

    `needs_batch_mean`: the mean of c and r over the global batch. A loss that is not `bounded_below` can be driven down
    without limit by a policy that gives up on the rejected completions: training watches for it.
    """

    options: tuple[str, ...] = ()
    needs_reference: bool = True
    needs_batch_mean: bool = False
    bounded_below: bool = True


OBJECTIVES: dict[str, Traits] = {
    "sigmoid": Traits(("label_smoothing",)),
    "robust": Traits(("label_smoothing",), bounded_below=False),
    "ipo": Traits(),
    "ipo-mean": Traits(),
    "hinge": Traits(),
    "rpo": Traits(("alpha",)),
    "dpop": Traits(("lambda_",)),
    "sigmoid-norm": Traits(),
    "simpo": Traits(("gamma",), needs_reference=False),
    "orpo": Traits(("lambda_",), needs_reference=False),
    "kto": Traits(("lambda_chosen", "lambda_rejected"), needs_batch_mean=True),
    "unlikelihood": Traits(("alpha",), needs_reference=False, bounded_below=False),
}


def reading(option: str) -> tuple[str, ...]:
    """The names of the objectives that read an option."""
    return tuple(name for name, traits in OBJECTIVES.items() if option in traits.options)
