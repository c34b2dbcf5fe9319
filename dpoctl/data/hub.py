"""Data sets on the Hub, or in a directory of that form, through `datasets`."""

from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from ..runtime.hub_data import PREFIX, HubData, commit_of, parse
from .jsonl import Found
from .tables import as_json


def hub_rows(path: str) -> Iterator[Found]:
    """(row number from 1, row) of `hub:NAME[@REVISION][:CONFIG][:SPLIT]`, at the commit that the manifest records.

    Raises InputError where the set cannot be loaded, and where config or split is not named and there are several.
    """
    import datasets

    datasets.disable_progress_bars()
    data = parse(path)
    revision = None if data.is_local else commit_of(data.name, data.revision)
    try:
        config, split = _config_and_split(data, revision)
        table = datasets.load_dataset(data.name, config, split=split, revision=revision)
    except InputError:
        raise
    except Exception as error:  # datasets and the Hub's client raise dozens of types, which call for the same answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "check the name and the connection to the Hub, or give a file with the same rows"
        raise InputError(f"{path}: cannot be loaded ({reason})", hint) from None
    for number, row in enumerate(table, 1):
        yield number, as_json(row)


def _config_and_split(data: HubData, revision: str | None) -> tuple[str, str]:
    import datasets

    options: dict[str, Any] = {"revision": revision}
    configs = datasets.get_dataset_config_names(data.name, **options)
    named = data.parts[0] if data.parts else ""
    if len(data.parts) == 2 or named in configs:
        config, wanted = named, data.parts[1] if len(data.parts) == 2 else ""
    else:
        config, wanted = "", named
    if not config and len(configs) > 1 and "default" not in configs:
        raise _choice(data, "configurations", [f"{name}:SPLIT" for name in configs])
    config = config or ("default" if "default" in configs else configs[0])
    if config not in configs:
        raise _choice(data, "configurations, none of that name", configs)
    splits = datasets.get_dataset_split_names(data.name, config, **options)
    if wanted and wanted not in splits:
        raise _choice(data, f"splits, none named {wanted!r}", splits)
    if not wanted and len(splits) > 1:
        within = "" if len(configs) == 1 else f"{config}:"
        raise _choice(data, "splits", [f"{within}{name}" for name in splits])
    return config, wanted or splits[0]


def _choice(data: HubData, what: str, names: list[str]) -> InputError:
    name = PREFIX + data.name + ("" if data.revision == "main" else f"@{data.revision}")
    return InputError(
        f"{name}: has {len(names)} {what}", f"give one of {', '.join(f'{name}:{each}' for each in names)}"
    )
