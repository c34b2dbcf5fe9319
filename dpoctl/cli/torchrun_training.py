"""A training command under torchrun: rank 0 claims the output, the others follow, and all end alike."""

from .. import log
from ..config.training import Training
from ..errors import DpoctlError, Interrupted, RankLost
from ..outputs import claims
from ..runtime import rendezvous
from .claiming import claim, stage


def run(name: str, config: Training) -> int:
    """This rank's part of the command.

    What every rank can see for itself (a mistake, a complete run) it answers without the others, and without torch.
    Raises Interrupted where another rank is lost.
    """
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
        return Interrupted.exit_code  # all stop at the same update, and rank 0 says it
    except RuntimeError as e:
        if not rendezvous.is_lost(e):
            raise
        raise rendezvous.lost(e, config.rank_timeout) from e
    return 0


def _lead(name: str, config: Training) -> None:
    before = rendezvous.broadcasts()
    try:
        with claim(name, config) as output:
            if output.finished:
                log.say(f"{config.out}: complete already, nothing to do")
            else:
                stage(name).run(config, output)
    except DpoctlError as e:
        if rendezvous.broadcasts() == before:
            rendezvous.broadcast_refusal(e, config.rank_timeout)
        raise
