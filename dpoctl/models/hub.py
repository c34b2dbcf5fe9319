"""Find a model's files: a local directory, or a hub id downloaded into the hub's cache.

Standard library only at import time, so that a mistyped path is reported without waiting for torch.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from ..outputs import adapter_base

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "config.yaml", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.bpe"]
_IGNORED = ["*/*", "consolidated*", "training_args.bin", "optimizer*", "scheduler*"]  # "*/*": onnx/, checkpoints/ ...


def looks_like_hub_id(path: str) -> bool:
    """Whether `path`, which is not a local directory, can name a hub repository.

    `runs/sft` has the form of a hub id, but where a directory `runs` exists it is taken for a path.
    """
    return bool(_HUB_ID.fullmatch(path)) and not ("/" in path and Path(path).parent.is_dir())


def check_path(path: str) -> None:
    """Refuse a path that is neither a model's directory nor a possible hub id, without network access.

    Raises InputError naming the path, with the most similar existing directory as a hint.
    """
    here = Path(path).expanduser()
    if here.is_dir():
        if not (here / "config.json").is_file() and not is_adapter(str(here)):
            raise InputError(f"{path}: not a model directory, it has no config.json", hint=_inside(here))
        return
    if here.exists():
        raise InputError(f"{path}: is a file; a model directory or hub id is needed", "give its directory")
    if not looks_like_hub_id(path):
        near = _nearest(here)
        raise InputError(f"{path}: no such model directory", hint=f"did you mean {near}?" if near else "check the path")


def base_of(adapter: str) -> str:
    """The base model that an adapter's directory names. Raises InputError as `adapter_base.find` does."""
    return adapter_base.find(adapter).path


def resolve_base(
    adapter: str, path: str, revision: str | None, *, with_code: bool = False, weights: bool = True
) -> str:
    """The local directory of an adapter's base model. Raises InputError, which says so, as `resolve` does."""
    try:
        return resolve(path, revision, with_code=with_code, weights=weights)
    except InputError as e:
        hint = f"{e.hint}; " if e.hint else ""
        raise InputError(f"{adapter}: an adapter, of whose base: {e.message}", hint + adapter_base.ASK) from e


def is_adapter(folder: str) -> bool:
    """Whether a directory holds an adapter and no complete model."""
    files = Path(folder)
    return (files / "adapter_config.json").is_file() and not any(files.glob("model*.safetensors*"))


def resolve(path: str, revision: str | None = None, *, with_code: bool = False, weights: bool = True) -> str:
    """The local directory of the model that `path` names; a hub id is downloaded or read from the cache.

    Only what a model needs is fetched: configuration, tokenizer and safetensors (`.bin` where there are none), Python
    files only `with_code`; without `weights`, configuration and tokenizer alone. Raises InputError for a missing path
    or a hub id that cannot be fetched.
    """
    check_path(path)
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    small = _SMALL_FILES + (["*.py"] if with_code else [])
    try:
        folder = _fetch(path, revision, [*small, "*.safetensors"] if weights else small)
        if weights and not any(Path(folder).glob("*.safetensors")):
            folder = _fetch(path, revision, [*small, "*.bin"])
            if not any(Path(folder).glob("*.bin")):
                raise OSError("it has no weights, or only its small files are in the cache")
    except Exception as e:
        if not (isinstance(e, (OSError, ValueError)) or type(e).__module__.startswith("http")):  # not the Hub client's
            raise
        problem, hint = hub_problem(e, revision)
        near = _nearest(Path(path).expanduser())
        raise InputError(
            f"{path}: no such directory; {problem}", hint=f"did you mean {near}? Otherwise {hint}" if near else hint
        ) from e
    return folder


def hub_problem(error: BaseException, revision: str | None = None) -> tuple[str, str]:
    """(what is missing, what to do about it) where a model or data set cannot be fetched from the Hub.

    The library's errors quote addresses and settings over several sentences; their types say which case it is.
    """
    names = {cls.__name__ for e in _causes(error) for cls in type(e).__mro__}
    status = next((s for e in _causes(error) if (s := getattr(getattr(e, "response", None), "status_code", None))), 0)
    if "OfflineModeIsEnabled" in names:
        return "not in the Hub's cache and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE, or give a local path"
    if "GatedRepoError" in names:
        return "its repository on the Hub is gated", "request access on its page, then set HF_TOKEN"
    if "RevisionNotFoundError" in names:
        return f"the Hub has no revision {revision} of it", "give a branch, tag or commit that its page lists"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"} or status == 401:
        return "not found on the Hub", "check the spelling; a private repository needs HF_TOKEN"
    if status:
        return f"the Hub answers with status {status}", "try again later"
    if names & {"LocalEntryNotFoundError", "TransportError", "ConnectionError", "OfflineError"}:
        return "not in the Hub's cache and the Hub cannot be reached", "check the network, or give a local path"
    return f"not found on the Hub ({_reason(error)})", "check the spelling and the network"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fetch(path: str, revision: str | None, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED)


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__


def _nearest(path: Path) -> str | None:
    """The directory that `path` may have meant: the most similar name in the same directory."""
    if not path.parent.is_dir():
        return None
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / near[0]) if near else None


def _inside(folder: Path) -> str:
    """The hint for a directory without config.json: often the model is one level down."""
    inner = sorted(config.parent for config in folder.glob("*/config.json"))
    if inner:
        return f"there is a model in {inner[0]}"
    return "give a directory as save_pretrained writes it: config.json, weights, tokenizer"
