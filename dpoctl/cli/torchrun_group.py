"""A command whose ranks compute together under torchrun: training and `evaluate`.

Rank 0 claims the output, the other ranks follow, and all exit alike.
"""

from contextlib import ExitStack
from typing import Any

from .. import log
from ..errors import DpoctlError, Interrupted, RankLost
from ..outputs import claims
from ..runtime import rendezvous
from ..runtime.long_work import beating
from .claiming import claim, stage
from .torchrun_rows import refuse_shard


def run(name: str, config: Any) -> int:
    """Run this rank's part of a command whose config is Training or Evaluate; returns the exit code.

    A mistake in the options or a complete output is detected on every rank alone, without communication and without
    torch. Rank 0 alone hashes the inputs of an output that is not complete.
    Raises RankLost where another rank died or does not answer, InputError where --shard is given.
    """
    if shard := getattr(config, "shard", None):
        refuse_shard(shard)
    if rendezvous.rank():
        log.only_errors()
    output = claim(name, config, by=claims.follow)
    if output.finished and rendezvous.rank():
        return 0
    try:
        if rendezvous.rank() == 0:
            _lead(name, config)
        else:
            stage(name).run(config, output)
    except RankLost:
        raise
    except Interrupted:
        if rendezvous.rank() == 0:
            raise
        return Interrupted.exit_code  # all ranks stop at the same point; rank 0 reports it
    except RuntimeError as e:
        if not rendezvous.is_lost(e):
            raise
        raise rendezvous.lost(e, config.rank_timeout) from e
    return 0


def _lead(name: str, config: Any) -> None:
    """Rank 0: claim the output and run the stage; the other ranks are told of a refusal."""
    before = rendezvous.broadcasts()
    try:
        with ExitStack() as held:
            with beating(config.rank_timeout):  # the others wait while the inputs are hashed
                output = held.enter_context(claim(name, config))
            if output.finished:
                log.say(f"{config.out}: complete already, nothing to do")
            else:
                stage(name).run(config, output)
    except DpoctlError as e:
        if rendezvous.broadcasts() == before:
            rendezvous.broadcast_refusal(e, config.rank_timeout)
        raise
