"""Data sets on the Hub as inputs: the notation hub:NAME[@REVISION][:CONFIG][:SPLIT], and the commit that is read."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import InputError

PREFIX = "hub:"
NOTATION = "hub:NAME[@REVISION][:CONFIG][:SPLIT]"


@dataclass(frozen=True)
class HubData:
    """A data set: a name on the Hub or a directory. `parts`: what follows, config and split or one of them."""

    name: str
    revision: str
    parts: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether the name is that of a directory here, which has no revisions."""
        return os.path.isdir(self.name)


def is_hub_data(path: str | os.PathLike) -> bool:
    """Whether an input is written as a data set on the Hub."""
    return os.fspath(path).startswith(PREFIX)


def parse(text: str) -> HubData:
    """The data set that `hub:...` names. Raises InputError for another form."""
    name, *parts = text.removeprefix(PREFIX).split(":")
    name, at, revision = name.partition("@")
    if not name or len(parts) > 2 or (at and not revision) or (parts and not parts[-1]):
        raise InputError(f"{text}: not a data set", hint=f"expected {NOTATION}, such as hub:trl-lib/tldr:train")
    return HubData(name, revision or "main", tuple(parts))


@lru_cache
def commit_of(name: str, revision: str) -> str:
    """The commit of a data set's revision: from the Hub, or from the cache where the Hub cannot be reached.

    Raises InputError where neither knows it.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants

    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / revision
    if not constants.HF_HUB_OFFLINE:
        try:
            commit = HfApi().dataset_info(name, revision=revision, timeout=20).sha
            if commit:
                with suppress(OSError):  # as the Hub's own client keeps it, for work without a connection
                    cached.parent.mkdir(parents=True, exist_ok=True)
                    cached.write_text(commit)
                return commit
        except Exception as error:  # the client raises dozens of types, which call for the same answer
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        reason = "HF_HUB_OFFLINE is set"
    with suppress(OSError):
        return cached.read_text().strip()
    raise InputError(
        f"{PREFIX}{name}: cannot be loaded ({reason})",
        hint="check the name and the connection to the Hub, or give a file with the same rows",
    )
