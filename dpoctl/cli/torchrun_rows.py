"""A command that writes rows under torchrun: each rank writes one shard, and rank 0 joins the shards.

Ranks exchange only files. A slow rank, or one whose shard another job resumes, delays rank 0 alone, which waits at most
--rank-timeout minutes for a shard that does not grow.
"""

import io
import os
import time
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any, NoReturn

from .. import log
from ..config.files import Merge
from ..config.schema import field_of, is_read, spec_of
from ..errors import InputError, Interrupted
from ..outputs.claims import Output
from ..outputs.manifests import read_manifest
from ..runtime import signals
from .claiming import claim, run_claimed

_EVERY_S = 0.5
_GROWING = (".progress", ".samples.progress", ".plan.json")  # the files that a rank at work writes


def run(name: str, config: Any) -> int:
    """Run this rank's part of a command whose config is Sharded; returns the exit code.

    Raises InputError where --shard is given or the command cannot be sharded, Interrupted where a shard stops growing.
    """
    # Without these variables nothing in this process waits for the others to join a process group.
    rank, world = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    if config.shard:
        refuse_shard(config.shard)
    shards = [_shard(config, number, world) for number in range(1, world + 1)]
    if problems := list(shards[rank].check_shard()):
        raise InputError(problems[0], hint="run it without torchrun")
    shard = field_of(config, "shard")
    if not is_read(config, shard):
        reason = spec_of(shard).when.unmet(config)
        raise InputError(f"ranks split {name} by --shard, which has no effect {reason}", hint="run it without torchrun")
    if rank:
        if read_manifest(config.out) and not config.overwrite:
            return 0  # rank 0 reports that the output is complete, or refuses
        log.only_warnings()
        return _run_shard(name, shards[rank])
    with claim(name, config) as joined:
        if joined.finished:
            log.say(f"{config.out}: complete already, nothing to do")
            return 0
        _run_shard(name, shards[0])
        _wait([shard.out for shard in shards], config.rank_timeout)
        _join(shards, config, joined)
    return 0


def refuse_shard(shard: str) -> NoReturn:
    """Raises InputError for --shard under torchrun."""
    raise InputError(f"--shard {shard}: ranks split the work themselves", hint="leave --shard out")


def _run_shard(name: str, shard: Any) -> int:
    """Write a shard without the table of its rows: rank 0 prints that of all rows."""
    with redirect_stdout(io.StringIO()):
        return run_claimed(name, shard)


def _shard(config: Any, number: int, of: int) -> Any:
    changed = {"shard": f"{number}/{of}", "out": _named(config.out, number, of)}
    if completions := getattr(config, "completions_out", None):
        changed["completions_out"] = _named(completions, number, of)
    return replace(config, **changed)


def _named(path: str, number: int, of: int) -> str:
    stem = path.removesuffix(".gz").removesuffix(".jsonl")
    return f"{stem}.shard-{number:04d}-of-{of:04d}{path[len(stem) :]}"


def _wait(paths: list[str], minutes: float) -> None:
    """Return when every shard is complete.

    Raises Interrupted when the missing ones have not grown for `minutes`, and on a signal.
    """
    from ..stages.merge import unfinished

    seen, since = None, time.monotonic()
    while missing := unfinished(paths, paths[0]):
        now = [_size(file + end) for file in missing for end in _GROWING]
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > 60 * minutes:
            raise Interrupted(
                f"{', '.join(missing)}: no progress for {minutes:g} minutes (--rank-timeout)",
                hint="see why that rank stopped; rerun the command to resume every shard",
            )
        signals.at_boundary("its own shard")
        time.sleep(_EVERY_S)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _join(shards: list[Any], config: Any, joined: Output) -> None:
    from ..stages import merge

    if completions := getattr(config, "completions_out", None):  # first: a complete --out implies complete completions
        paths = tuple(shard.completions_out for shard in shards)
        merge.join_shards(Merge(inputs=paths, out=completions, overwrite=config.overwrite))
    merge.join_ranks([shard.out for shard in shards], joined)
