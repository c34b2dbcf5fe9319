"""How the ranks of a command that computes together start: they learn from rank 0, and join a process group."""

from . import collectives, devices, rendezvous
from .devices import Compute


def open_together(device: str, dtype: str, resuming: bool, minutes: float) -> tuple[Compute, bool]:
    """(the device and precision of --device and --dtype, whether rank 0's output is resumed) after joining the ranks.

    `resuming` is what this process has found, `minutes` those of --rank-timeout. Without torchrun nothing is joined.
    Raises rank 0's refusal, and InputError as `devices.open_compute` does.
    """
    distributed = collectives.world_size() > 1
    if distributed:
        resuming = rendezvous.broadcast_start(resuming, minutes)
    compute = devices.open_compute(device, dtype)
    if distributed:
        collectives.join_ranks(compute.device, minutes)
    return compute, resuming
