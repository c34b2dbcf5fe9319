"""Deterministic algorithms on a GPU, asked for by --deterministic; where an operation has none, it raises.

torch is imported only where a device is opened: a complete output is found without it.
"""

import os

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when CUDA starts
_FIXED = (":4096:8", ":16:8")  # values with which its products are deterministic, by its manual
_asked = False


def ask(wanted: bool) -> None:
    """Say whether the devices that this process opens compute deterministically."""
    global _asked
    _asked = wanted
    if wanted and os.environ.get(_WORKSPACE) not in _FIXED:
        os.environ[_WORKSPACE] = _FIXED[0]


def apply(kind: str) -> None:
    """Set torch's algorithms as asked for devices of a kind; a CPU, where all are deterministic, is left as it is."""
    import torch
    from torch.utils import deterministic

    wanted = _asked and kind != "cpu"
    if wanted == torch.are_deterministic_algorithms_enabled():
        return
    torch.use_deterministic_algorithms(wanted)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all memory is written before it is read


def missing(error: BaseException) -> str | None:
    """The operation that has no deterministic algorithm, where that is what torch's error says."""
    name, found, _ = str(error).partition(" does not have a deterministic implementation")
    return name.split()[-1] if found and name.split() else None
