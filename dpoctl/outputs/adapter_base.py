"""Which model an adapter was trained on: its name in adapter_config.json, and by content in base_model.json beside it.

Standard library only.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import log
from ..errors import InputError
from .files import dump, sha256_file, write_atomic

_RECORD = "base_model.json"
_OPTIONAL = ("quantized", "trained_in")
# the hint of every message about a base that cannot be used
ASK = "dpoctl merge ADAPTER --base MODEL --out DIR merges it into a base that lies elsewhere; use DIR then"


@dataclass(frozen=True)
class Base:
    """The base of an adapter: a path or hub id, its revision on the Hub, and the SHA-256 of its weights.

    `quantized`: the method by which its checkpoint is quantised. `trained_in`: `4bit` or `8bit` where the adapter was
    trained on its weights in so many bits.
    """

    path: str
    revision: str | None
    weights_sha256: str | None
    quantized: str | None = None
    trained_in: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a directory rather than a hub id."""
        return os.path.isdir(os.path.expanduser(self.path))


def describe(path: str, folder: str, revision: str | None, **quantized: str | None) -> Base:
    """The base that `path` names, whose files are in `folder`; a directory by its absolute path.

    `quantized` and `trained_in` are those of `Base`.
    """
    here = os.path.expanduser(path)
    return Base(os.path.abspath(here) if os.path.isdir(here) else path, revision, weights_sha256(folder), **quantized)


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of the names and contents of a model's weight files."""
    digest = hashlib.sha256()
    for file in sorted(p for suffix in ("*.safetensors", "*.bin") for p in Path(folder).glob(suffix)):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def write_record(base: Base, folder: Path, out: Path) -> None:
    """Write the record to `folder`, whose files will be in `out`; a directory is recorded relative to `out`."""
    path = os.path.relpath(base.path, out.absolute()) if base.is_local else base.path
    record = {"path": path, "local": base.is_local, "revision": base.revision, "weights_sha256": base.weights_sha256}
    record |= {name: value for name in _OPTIONAL if (value := getattr(base, name))}
    write_atomic(folder / _RECORD, dump(record))


def find(adapter: str | Path) -> Base:
    """The base of the adapter in a directory: of the places that its files name, the one with the recorded content.

    Raises InputError: no adapter, no base named, none in any of the places, or only another model.
    """
    folder = Path(adapter).expanduser()
    if folder.is_file():
        hint = "shards are .jsonl files; an adapter is a directory with adapter_config.json"
        raise InputError(f"{adapter}: neither a shard nor an adapter's directory", hint=hint)
    named, record = _named(folder), _read(folder / _RECORD)
    revision, digest = record.get("revision"), record.get("weights_sha256")
    places = [str(folder / record["path"])] if record.get("local") else []
    places += [named] if named else []
    found = [os.path.normpath(p) for p in map(os.path.expanduser, places) if os.path.isdir(p)]
    for place in found:
        if digest is None or weights_sha256(place) == digest:
            return Base(place, None, digest)
    if found:
        raise InputError(f"{adapter}: {found[0]} is not the model that it was trained on: other weights", hint=ASK)
    if not named:
        hint = "--base of dpoctl merge says which model the adapter was trained on"
        raise InputError(f"{folder / 'adapter_config.json'}: names no base model", hint=hint)
    if record.get("local") or os.path.isabs(named):
        raise InputError(f"{adapter}: an adapter, whose base model {named} does not exist", hint=ASK)
    return Base(named, revision, digest)


def check(adapter: str | Path, base: str, folder: str) -> None:
    """Raise InputError where `base`, whose files are in `folder`, has other weights than the adapter was trained on.

    An adapter that was trained on a quantised checkpoint may get the model in full precision that this was made from,
    of which there is no record.
    """
    record = _read(Path(adapter).expanduser() / _RECORD)
    digest = record.get("weights_sha256")
    if digest is not None and weights_sha256(folder) != digest:
        if method := record.get("quantized"):
            log.warn(f"{adapter}: was trained on weights that {method} quantised; that {base} has them is not checked")
            return
        raise InputError(
            f"{adapter}: {base} is not the model that it was trained on: other weights",
            hint="give the base that it was trained on (its path then is in base_model.json)",
        )


def trained_in(adapter: str | Path) -> str | None:
    """`4bit` or `8bit` where the adapter in a directory was trained with --quantize; else None."""
    return _read(Path(adapter).expanduser() / _RECORD).get("trained_in")


def _named(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        raise InputError(
            f"{folder}: not an adapter's directory: no adapter_config.json that can be read",
            hint="give what peft's save_pretrained wrote",
        ) from None


def _read(file: Path) -> dict[str, Any]:
    """The record; empty where dpoctl has not written one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("path"), str):
        raise InputError(f"{file}: damaged: not what dpoctl wrote", hint="is the copy complete?")
    return found
