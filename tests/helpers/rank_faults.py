"""Faults of one rank, in the environment of a command that `warm.py` forks.

`DPOCTL_RANK_FAULT="1 SIGKILL 3 MODULE:FUNCTION"`: rank 1 gets the signal before its third call of the function.
`DPOCTL_RANK_SET="MODULE:NAME=EXPRESSION"` gives a module's name another value on every rank.
`DPOCTL_AHEAD=1`: the local sampler generates in place of vLLM, in vLLM's order of work.
"""

import importlib
import os
import signal
from itertools import count


def install() -> None:
    """Do what the variables ask for."""
    if os.environ.get("DPOCTL_AHEAD"):
        from .engines import use_ahead

        use_ahead(setattr)
    if constant := os.environ.get("DPOCTL_RANK_SET"):
        place, _, expression = constant.partition("=")
        module, _, name = place.partition(":")
        holder = importlib.import_module(module)
        setattr(holder, name, eval(expression, vars(holder)))
    if fault := os.environ.get("DPOCTL_RANK_FAULT"):
        rank, what, call, place = fault.split()
        if rank == os.environ.get("RANK", "0"):
            _signal_before(place, int(call), signal.Signals[what])


def _signal_before(place: str, call: int, number: signal.Signals) -> None:
    module, _, name = place.partition(":")
    holder = importlib.import_module(module)
    function, calls = getattr(holder, name), count(1)

    def faulty(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(holder, name, faulty)
