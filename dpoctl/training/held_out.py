"""Training and held-out rows of the commands that read --data and --eval-data, which may be several files each."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from .. import log
from ..data.duplicates import count_duplicates, count_shared
from ..data.readers import Rows, load_files
from ..data.streams import bare_name
from ..runtime.hub_data import is_hub_data
from .options import DataOptions


def load_rows(config: DataOptions, kind: str) -> tuple[Rows, Rows | None]:
    """(rows of --data, rows of --eval-data or None). Says how many are duplicates. Raises as `load_files` does."""
    load = partial(load_files, kind=kind, skip_bad=config.skip_bad_rows, columns=config.columns)
    rows = load(config.data)
    counts = count_duplicates(rows.rows)
    if counts["duplicate_rows"]:
        log.say(f"{rows.path}: {counts['duplicate_rows']} of {len(rows.rows)} rows have the texts of another row")
    if counts["contradictions"]:
        log.warn(f"{rows.path}: {counts['contradictions']} pairs are in it the other way round too")
    return rows, load(config.eval_data) if config.eval_data else None


def warn_of_shared(rows: Rows, held_out: Rows | None) -> None:
    """Warn of held-out rows whose prompts are trained on: their metrics say little of unseen prompts."""
    if held_out and (shared := count_shared(held_out.rows, rows.rows)):
        log.warn(f"{held_out.path}: the prompts of {shared} of {len(held_out.rows)} rows are in the training data too")


def counts_of(rows: Rows) -> dict[str, Any]:
    """The rows of each file, for the manifest; nothing where there is one file."""
    names = names_of(list(rows.by_file))
    return {f"rows/{names[path]}": n for path, n in rows.by_file.items()} if len(names) > 1 else {}


def parts_of(lines: Sequence[Any], paths: Sequence[str]) -> dict[str, list[int]]:
    """Name of each file -> indices of its rows, by the lines of `Rows`; empty where there is only one file."""
    if len(paths) < 2:
        return {}
    found: dict[str, list[int]] = {name: [] for name in names_of(paths).values()}
    names = names_of(paths)
    for i, line in enumerate(lines):
        found[names[line.rpartition(":")[0]]].append(i)
    return found


def names_of(paths: Sequence[str]) -> dict[str, str]:
    """Path -> a short name for its metrics: the file's without its suffix, with its folder or a number if they meet."""
    short = {path: _short(path) for path in paths}
    twice = {name for name, n in Counter(short.values()).items() if n > 1}
    names: dict[str, str] = {}
    for path, name in short.items():
        parts = path.rstrip("/").split("/")
        if name in twice and len(parts) > 1:
            name = f"{parts[-2]}_{name}"
        number = 2
        unique = name
        while unique in names.values():
            unique, number = f"{name}_{number}", number + 1
        names[path] = unique
    return names


def _short(path: str) -> str:
    if is_hub_data(path):
        return path.removeprefix("hub:").replace("/", "_").replace(":", "_")
    bare = bare_name(path.rstrip("/"))
    shown = path.rstrip("/").rpartition("/")[2][: len(bare)]
    for end in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"):
        if bare.endswith(end):
            return shown[: -len(end)] or shown
    return shown
