"""Files opened for reading, whatever they are compressed with, and the messages of those that cannot be read."""

import difflib
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import IO, Any, cast

from ..errors import InputError
from ..runtime import pipes

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COMPRESSIONS = (".gz", ".zst")
_FOREIGN = {  # first bytes -> (what the file is, a hint)
    b"BZh": ("compressed with bzip2", "decompress it with bunzip2, or compress it with gzip"),
    b"\xfd7zXZ\x00": ("compressed with xz", "decompress it with unxz, or compress it with gzip"),
    b"PK\x03\x04": ("a zip archive or a workbook", "unpack it, or save the table as CSV in UTF-8"),
    _GZIP: ("compressed twice", "decompress it once with gunzip"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch the file with git lfs pull"),
}
_DAMAGED = "the file is truncated or damaged: copy it or write it again"


def bare_name(path: str | PathLike) -> str:
    """The lower-case name of a file without the suffix of its compression."""
    name = Path(path).name.lower()
    return next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)


@contextmanager
def opened(path: str | PathLike) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed where they are gzip or zstd; a pipe's from its copy.

    Raises InputError for a missing or unreadable file, a directory, and damaged compressed data, also while the file is
    read inside the block.
    """
    start = b""
    try:
        with pipes.readable(path).open("rb") as file:
            start = file.peek(4)[:4]
            if start[:2] == _GZIP:
                with gzip.open(file) as stream:
                    _check_content(path, stream)
                    yield cast(IO[bytes], stream)
            elif start == _ZSTD:
                yield _zstd(file)
            else:
                _check_content(path, file)
                yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", _nearest_file(Path(path))) from None
    except IsADirectoryError:
        hint = listing_of(Path(path))
        raise InputError(f"{path}: a directory, expected a file of rows or a saved data set", hint) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: broken gzip data: {error}", _DAMAGED) from None
    except OSError as error:
        if start == _ZSTD:
            raise InputError(f"{path}: broken zstd data: {error}", _DAMAGED) from None
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def is_compressed(path: str | PathLike) -> bool:
    """Whether a file that can be opened is gzip or zstd. Raises as `opened` does."""
    with opened(path):
        with pipes.readable(path).open("rb") as file:
            start = file.read(4)
    return start[:2] == _GZIP or start == _ZSTD


def _check_content(path: str | PathLike, stream: Any) -> None:
    """Raise InputError for a file whose first bytes are those of an archive or of a pointer."""
    start = stream.peek(32)
    for first, (what, hint) in _FOREIGN.items():
        if start.startswith(first):
            raise InputError(f"{path}: {what}, expected rows, plain or compressed with gzip or zstd", hint)


def _zstd(file: Any) -> IO[bytes]:
    import pyarrow  # the standard library reads zstd from Python 3.14 on

    return cast(IO[bytes], BufferedReader(pyarrow.CompressedInputStream(file, "zstd")))


def _nearest_file(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f"there is no directory {path.parent}"
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}"
    near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
    return f"did you mean {path.parent / near[0]}?" if near else listing_of(path.parent)


def listing_of(folder: Path) -> str:
    """What row files a folder holds, as a hint."""
    ends = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
    names = sorted(name for name in _names(folder) if bare_name(name).endswith(ends))
    more = ", ..." if len(names) > 8 else ""
    return f"{folder} holds {', '.join(names[:8])}{more}" if names else f"{folder} holds no .jsonl file"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # no permission: the hint does without names
        return []
