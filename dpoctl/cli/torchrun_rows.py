"""A row command under torchrun: each rank does its own shard, and rank 0 joins them.

Ranks meet only through files, so one that is slow, or that another job continues, holds up nobody but rank 0; and rank 0
waits no longer than --rank-timeout for a shard that does not grow.
"""

import os
import time
from dataclasses import replace
from typing import Any

from .. import log
from ..config.files import Merge
from ..config.sampling import Sharded
from ..errors import InputError, Interrupted
from ..outputs.manifests import read_manifest
from .claiming import claim, run_claimed

_EVERY_S = 0.5


def run(name: str, config: Sharded) -> int:
    """This rank's part of the command.

    Raises InputError where the shards are not for ranks to choose, Interrupted where another rank's shard stays away.
    """
    # From here on this process is a job of its own: it must not wait for the others to join a process group.
    rank, world = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    if config.shard:
        raise InputError(f"--shard {config.shard}: {world} ranks split the work themselves", hint="leave --shard out")
    shards = [_shard(config, number, world) for number in range(1, world + 1)]
    if problems := shards[rank].problems():
        raise InputError(problems[0], hint="start it without torchrun")
    if rank:
        if read_manifest(config.out) and not config.overwrite:
            return 0  # rank 0 says that there is nothing to do, or why not
        return run_claimed(name, shards[rank])
    with claim(name, config) as whole:
        if whole.finished:
            log.say(f"{config.out}: complete already, nothing to do")
            return 0
        run_claimed(name, shards[0])
        _wait([shard.out for shard in shards], config.rank_timeout)
        _join(shards, config, whole)
    return 0


def _shard(config: Any, number: int, of: int) -> Any:
    own = {"shard": f"{number}/{of}", "out": _named(config.out, number, of)}
    if further := getattr(config, "completions_out", None):
        own["completions_out"] = _named(further, number, of)
    return replace(config, **own)


def _named(path: str, number: int, of: int) -> str:
    stem = path.removesuffix(".gz").removesuffix(".jsonl")
    return f"{stem}.shard-{number:04d}-of-{of:04d}{path[len(stem) :]}"


def _wait(paths: list[str], minutes: float) -> None:
    """Until every rank's shard is complete; Interrupted once those missing have not grown for `minutes`."""
    from ..stages.merge import unfinished

    seen, since = None, time.monotonic()
    while missing := unfinished(paths, paths[0]):
        now = [_size(file + end) for file in missing for end in (".progress", ".plan.json")]
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > 60 * minutes:
            raise Interrupted(
                f"{', '.join(missing)}: no progress for {minutes:g} minutes (--rank-timeout)",
                hint="see why that rank stopped; the same command again continues every shard",
            )
        time.sleep(_EVERY_S)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _join(shards: list[Any], config: Any, whole) -> None:
    from ..stages import merge

    if further := getattr(config, "completions_out", None):  # first, so that a complete --out has them beside it
        paths = tuple(shard.completions_out for shard in shards)
        merge.join_shards(Merge(inputs=paths, out=further, overwrite=config.overwrite))
    merge.join_ranks([shard.out for shard in shards], whole)
