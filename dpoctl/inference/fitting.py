"""What --dry-run says of memory: each phase of a command, the largest part by part, and what would make it fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from ..errors import InputError
from .memory import Phase, Target

Phases = Callable[[Any], list[Phase]]

_WORLDS = (2, 4, 8, 16, 32, 64)
_SMALLEST = {"tokens_per_batch": 256, "scorer_tokens_per_batch": 256, "generation_batch_size": 1}
_LORA_RANK = 16
_SHARED_BY = (2, 4, 8, 16)  # GPUs for one copy of a model in vLLM


def lines_of(config: Any, target: Target, phases: Phases) -> dict[str, Any]:
    """The lines of a plan that concern memory; `phases(config)` are those of a config, as it is or changed."""
    every = phases(config)
    if not every:
        return {}
    process = target.process_bytes()
    every = [replace(phase, parts=phase.parts | {"process": process}) for phase in every]
    largest = max(every, key=lambda phase: phase.total)
    shown = {f"memory in {phase.name}": size_of(phase.total) for phase in every} if len(every) > 1 else {}
    shown |= {f"memory: {part}": size_of(size) for part, size in largest.parts.items() if size}
    shown["memory of a device"] = f"{size_of(largest.total)} ({largest.name})"
    limit = target.hardware.memory
    if limit is None:
        return shown
    fits = largest.total <= limit
    shown["device"] = f"{target.hardware.name}, {size_of(limit)}: {'it fits' if fits else 'too small'}"
    if not fits:
        shown["what would fit"] = (
            "; or ".join(suggestions(config, phases, every, limit - process)) or "no change of these options"
        )
    return shown


def suggestions(config: Any, phases: Phases, found: Sequence[Phase], limit: int) -> Iterator[str]:
    """Changes of the options with which every phase fits into `limit` bytes, each with the memory that it takes then.

    `found` are the phases of the config as it is. Of each kind of change the first that helps, three at most.
    """
    parts = max(found, key=lambda phase: phase.total).parts
    whole = sum(parts.get(part, 0) for part in ("weights", "gradients", "optimizer"))
    kinds: set[str] = set()
    for kind, change in _changes(config):
        if kind in kinds or whole / change.get("plan_world_size", 1) > limit and "plan_world_size" in change:
            continue
        if _refused(replace(config, **change)):
            continue
        try:
            smaller = _shrunk(replace(config, **change), phases, limit, found if not change else None)
        except (InputError, ValueError):  # such as --lora without peft, or on an adapter
            continue
        if smaller is not None:
            changed, total = smaller
            yield f"{_flags(config, changed)} ({size_of(total)})"
            kinds.add(kind)
        if len(kinds) == 3:
            return


def _changes(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, changes to try), the least intrusive first; smaller batches are tried with each."""
    known = {f.name for f in fields(config)}
    yield "batches", {}
    may_shard = "parallel" in known and not _refused(replace(config, parallel="fsdp"))
    if "activation_checkpointing" in known:
        if not config.activation_checkpointing:
            yield "batches", {"activation_checkpointing": True}
        now = config.plan_world_size or 1 if config.parallel == "fsdp" else 1
        for world in _WORLDS if may_shard else ():
            if world > now:
                yield "devices", {"parallel": "fsdp", "plan_world_size": world, "activation_checkpointing": True}
    if getattr(config, "engine", "") == "vllm":
        for gpus in _SHARED_BY:
            if gpus > config.tensor_parallel_size:
                yield "GPUs", {"tensor_parallel_size": gpus}
    quantizes = "quantize" in known and not config.quantize
    if "lora" in known and not config.lora:
        adapters = {"lora": _LORA_RANK, "activation_checkpointing": True}
        yield "adapters", adapters
        if quantizes:
            yield "adapters", adapters | {"quantize": "4bit"}
    elif quantizes:
        yield "quantized", {"quantize": "4bit"}


def _refused(config: Any) -> bool:
    """Whether the options contradict each other."""
    checks = (getattr(config, name) for name in dir(config) if name.startswith("check_"))
    return any(True for check in checks for _ in check())


def _shrunk(config: Any, phases: Phases, limit: int, found: Sequence[Phase] | None) -> tuple[Any, int] | None:
    """(config with batches as large as fit, bytes), or None where what is held does not fit already.

    `found`: the phases of the config as it is, where they are known.
    """
    while True:
        largest = max(found or phases(config), key=lambda phase: phase.total)
        if largest.total <= limit:
            return config, largest.total
        name = "generation_batch_size" if "key cache" in largest.parts else "tokens_per_batch"
        name = "scorer_tokens_per_batch" if largest.name == "scoring" else name
        variable = {"key cache", "temporary", "activations"}
        held = sum(size for part, size in largest.parts.items() if part not in variable)
        now = getattr(config, name, None)
        if now is None or held >= limit or now <= _SMALLEST[name]:
            return None
        share = (limit - held) / (largest.total - held)
        smaller = max(_SMALLEST[name], _rounded(min(0.95 * share, 0.75) * now))
        config, found = replace(config, **{name: smaller}), None


def _rounded(value: float) -> int:
    """A whole number, of two binary digits, that is not larger."""
    whole = max(1, int(value))
    unit = 1 << max(0, whole.bit_length() - 2)
    return whole // unit * unit


def _flags(before: Any, after: Any) -> str:
    """The flags that differ, and the number of devices where it does."""
    changed = {f.name: getattr(after, f.name) for f in fields(after)}
    changed = {name: value for name, value in changed.items() if value != getattr(before, name)}
    world = changed.pop("plan_world_size", None)
    flags = ["--" + name.replace("_", "-") + ("" if value is True else f" {value}") for name, value in changed.items()]
    return " ".join([*flags, f"on {world} devices"] if world else flags)


def size_of(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
