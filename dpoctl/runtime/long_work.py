"""Work that takes one rank longer than --rank-timeout, for which the others wait as long as it shows that it lives.

A rank at work raises a counter in the store of all ranks from a thread: a killed or frozen process does not. The ranks
that have nothing to do wait at the store, not in a collective, whose time-out nothing can extend.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import rendezvous

_BEAT_S = 5.0
_group, _parts = 0, 0  # every rank does the same parts in the same order, in each process group anew


@contextmanager
def beating(minutes: float) -> Iterator[None]:
    """Show the other ranks that this one lives, though they wait for it: for work longer than a few seconds."""
    if rendezvous.world_size() == 1:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(done, minutes), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1.0)  # it may still connect to ranks that have already left


def _beat(done: threading.Event, minutes: float) -> None:
    while not done.wait(min(_BEAT_S, 60 * minutes / 4)):
        try:
            rendezvous.store(minutes).add(rendezvous.BEATS, 1)
        except RuntimeError:
            return  # the store is gone: the main thread will notice


@contextmanager
def long_work() -> Iterator[None]:
    """Work of different length on the ranks. At its end the others wait for the slowest one, however long it takes.

    Entered on every rank. Raises RankLost where another rank fails in it, or shows no life for --rank-timeout minutes.
    """
    global _group, _parts
    minutes = rendezvous.joined_minutes()
    if minutes is None:
        yield
        return
    _group, _parts = rendezvous.broadcasts(), _parts + 1 if _group == rendezvous.broadcasts() else 1
    store, part = rendezvous.store(minutes), f"dpoctl/part/{_group}/{_parts}"
    try:
        with beating(minutes):
            yield
    except BaseException:
        store.set(f"{part}/failed", str(rendezvous.rank()))
        raise
    if store.add(f"{part}/done", 1) == rendezvous.world_size():
        store.set(f"{part}/all", "")
    rendezvous.wait(f"{part}/all", minutes, failed=f"{part}/failed")
