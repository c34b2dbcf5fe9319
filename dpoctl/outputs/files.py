"""Atomic file writes, SHA-256 sums, and the errors of a full disk or a missing permission. Standard library only."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import StorageError

_MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|adapter_config|.*\.index)\.json"
    r"|.*\.(safetensors|bin|model|jinja|py)|merges\.txt|vocab\.txt"
)
_HASH_CACHE_FROM = 1 << 20  # bytes; hashing a smaller file is as fast as looking it up
_HASH_IN_TURN_FROM = 1 << 28  # bytes; a fraction of a second
_HASH_BYTES_PER_S = 2e8  # of a slow shared disk
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file so that readers see either the old content or the new, flushed to disk. Raises StorageError."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    tmp = path.with_name(f".{path.name}.tmp")
    with writing(path, len(data)):
        try:
            with open(tmp, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
        except OSError:
            with suppress(OSError):
                tmp.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: Path | str) -> None:
    """Flush a directory's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path | str) -> None:
    """Flush a file's content to disk."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def move_into(tmp: Path, folder: Path) -> list[Path]:
    """Move the files of `tmp` and of its folders into `folder`, each complete or absent, and return their new paths.

    They get the permissions of new files: safetensors makes its files readable by their owner alone.
    """
    moved = []
    folder.mkdir(exist_ok=True)
    mode = _mode_of_new_file(tmp / ".mode.tmp")
    for entry in sorted(tmp.iterdir()):
        if entry.is_dir():
            moved += move_into(entry, folder / entry.name)
            continue
        entry.chmod(mode)
        sync_file(entry)
        os.replace(entry, folder / entry.name)
        moved.append(folder / entry.name)
    tmp.rmdir()
    sync_directory(folder)
    return moved


def use_mode_of_new_files(path: Path) -> None:
    """Give a file the permissions that a new file in its folder gets (those of the umask)."""
    # Ranks write files of their own into one folder, so that the probe's name must be each rank's own too.
    path.chmod(_mode_of_new_file(path.with_name(f".{path.name}.mode.tmp")))


def _mode_of_new_file(probe: Path) -> int:
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


@contextmanager
def writing(path: Path | str, needs: int | None = None) -> Iterator[None]:
    """Turn a full disk or a missing permission inside the block into a StorageError that names `path`.

    `needs`: the bytes to be written, for the message.
    """
    try:
        yield
    except Exception as e:
        refused = storage_error(e, path, needs)
        if refused is None:
            raise
        raise refused from e


def storage_error(error: Exception, path: Path | str | None, needs: int | None = None) -> StorageError | None:
    """The StorageError for a write that failed for lack of space or permission; None for any other error.

    Libraries written in Rust (safetensors, tokenizers) raise their own exceptions, with the errno in the message.
    """
    if isinstance(error, StorageError):
        return None
    number = getattr(error, "errno", None) or next(iter(map(int, _RUST_NUMBER.findall(str(error)))), None)
    if number not in _NO_ROOM + _NOT_ALLOWED:
        return None
    prefix = f"{path}: " if path else ""
    wanted = "" if needs is None else f"{_bytes(needs)} needed, "
    room = ""
    if number == errno.EFBIG:
        room = f" ({wanted}a file may hold {_bytes(resource.getrlimit(resource.RLIMIT_FSIZE)[0])}: ulimit -f)"
    elif number in _NO_ROOM:
        with suppress(OSError):
            room = f" ({wanted}{_bytes(shutil.disk_usage(_existing(path or '.')).free)} free)"
    hint = "free some space" if number in _NO_ROOM else "check the permissions"
    return StorageError(
        f"{prefix}cannot be written: {os.strerror(number)}{room}",
        hint=f"{hint} or choose another location, then rerun the command to resume",
    )


def _existing(path: Path | str) -> Path:
    path = Path(path).absolute()
    return next((p for p in (path, *path.parents) if p.exists()), Path("/"))


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


# --- content ---------------------------------------------------------------------------------------------------------


_ROW = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def dump(data: Any) -> str:
    """Indented JSON; NaN and infinities become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_line(row: dict[str, Any]) -> str:
    """A row as one line of JSON; NaN and infinities become null."""
    try:
        return _ROW.encode(row) + "\n"
    except ValueError:  # rare, so that other rows are not walked through in Python
        return _ROW.encode(_finite(row)) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    return [_finite(v) for v in data] if isinstance(data, (list, tuple)) else data


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with an `id`, a digest of everything but `cost`, by which `is_intact` detects any change."""
    return {"id": _digest_of(content), **content}


def is_intact(content: dict[str, Any]) -> bool:
    """Whether sealed content is unchanged; content without an id passes."""
    return "id" not in content or content["id"] == _digest_of(content)


def _digest_of(content: dict[str, Any]) -> str:
    plain = json.loads(dump({k: v for k, v in content.items() if k not in ("id", "cost")}))  # as a reader gets it
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


def cache_home() -> Path:
    """The folder of dpoctl's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpoctl"


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file in hex. That of a large file is cached by path, size, mtime and inode."""
    path = Path(path).resolve()
    info = path.stat()
    if info.st_size < _HASH_CACHE_FROM:
        return _hash(path)
    known = {"size": info.st_size, "mtime_ns": info.st_mtime_ns, "inode": info.st_ino}
    entry = cache_home() / "sha256" / hashlib.sha256(str(path).encode()).hexdigest()
    if digest := _cached_hash(entry, known):
        return digest
    with _in_turn(entry, info.st_size):
        if digest := _cached_hash(entry, known):  # another process has hashed it meanwhile
            return digest
        digest = _hash(path)
        with suppress(OSError, StorageError):  # without a cache the file is hashed again
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(entry, json.dumps(seal(known | {"sha256": digest})))
    return digest


def _hash(path: Path) -> str:
    with open(path, "rb") as f:
        return running_sha256(f).hexdigest()


def _cached_hash(entry: Path, known: dict[str, int]) -> str | None:
    """The hash in a cache file, where it is that of the file described by `known`."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        cached = json.loads(entry.read_text())
        if {k: cached[k] for k in known} == known and "id" in cached and is_intact(cached):
            return cached["sha256"]
    return None


@contextmanager
def _in_turn(entry: Path, size: int) -> Iterator[None]:
    """Let one of the processes that share the cache hash a very large file: the ranks of a node all want its hash.

    The others wait for about the time that it takes, whatever becomes of it.
    """
    if size < _HASH_IN_TURN_FROM:
        yield
        return
    file = entry.with_suffix(".lock")
    with ExitStack() as opened:
        with suppress(OSError):  # no cache, or no locks: each process hashes
            file.parent.mkdir(parents=True, exist_ok=True)
            f = opened.enter_context(open(file, "w"))
            end = time.monotonic() + size / _HASH_BYTES_PER_S + 5
            while time.monotonic() < end:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.2)
        yield
        with suppress(OSError):
            file.unlink()


def running_sha256(f: BinaryIO) -> "hashlib._Hash":
    """The SHA-256 of an open file from its position to its end, which can be updated further."""
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest


def model_files(path: Path | str) -> list[Path]:
    """The files of a model directory that determine the model: weights, config, tokenizer, templates, code."""
    found = [p for p in Path(path).iterdir() if p.is_file() and is_model_file(p.name)]
    return sorted(found) + sorted(Path(path).glob("additional_chat_templates/*.jinja"))


def is_model_file(name: str) -> bool:
    """Whether a file of this name belongs to a model."""
    return bool(_MODEL_FILES.fullmatch(name))


def content_files(path: Path | str) -> list[Path]:
    """The files that determine a directory: a saved data set's, else a model's."""
    folder = Path(path)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return sorted(folder.rglob("*.arrow"))  # their descriptions hold a fingerprint that differs with each saving
    return model_files(folder)


def sha256_path(path: Path | str) -> str:
    """SHA-256 of a file, or of the files of a model or a saved data set (names and contents).

    An adapter includes its base.
    """
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in content_files(path):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    if base := _base_folder(path):  # the same adapter on another base is another model
        digest.update(f"base {sha256_path(base)}\n".encode())
    return digest.hexdigest()


def _base_folder(path: Path) -> str | None:
    """The directory of an adapter's base; None for other models, and where it is not there."""
    for name, key in (("base_model.json", "path"), ("adapter_config.json", "base_model_name_or_path")):
        with suppress(OSError, ValueError, AttributeError):
            base = json.loads((path / name).read_text(encoding="utf-8")).get(key)
            for place in (path / base, base) if base else ():
                if (path / "adapter_config.json").exists() and os.path.isdir(place):
                    return str(place)
    return None
