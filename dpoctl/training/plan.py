"""What --dry-run prints for a training stage: updates, tokens, FLOPs, and the memory of one device by part."""

from collections.abc import Callable, Iterable
from typing import Any

from ..data.encode import Limits, encode_pairs
from ..models import quantized
from ..models.load import untrained
from ..models.logprobs import Sequences
from ..runtime import devices
from . import estimate, pairs, setup
from .held_out import load_rows
from .optimization import make_optimizer
from .options import AdapterOptions, PairPlanOptions, PlanOptions

_INSPECTED = 64  # updates whose micro-batches are built to find the largest


def plan_of_training(
    config: PlanOptions,
    kind: str,
    steps: int,
    micros_of: Callable[[int], Iterable[Sequences]],
    loss: Callable,
    **head: Any,
) -> dict[str, Any]:
    """The plan of `steps` updates of a model of `kind` (`policy`, `reward`).

    `micros_of(step)`: the sequences of rank 0's micro-batches, which are the largest. `loss(model, sequences)`: a
    scalar that costs what the stage's loss does.
    """
    device = devices.pick_device(config.device)
    dtype = devices.pick_dtype(config.dtype, device)
    world = config.plan_world_size or 1
    micros = [list(micros_of(step)) for step in range(min(steps, _INSPECTED))]
    largest = max((m for of_step in micros for m in of_step), key=_tokens)
    tokens = sum(_tokens(m) for of_step in micros for m in of_step) * steps / len(micros)
    process = devices.process_bytes(device)  # before the estimate allocates anything
    found = estimate.estimate(
        lambda: _build(config, kind),
        estimate.Update(
            loss=lambda model: loss(model, largest),
            optimizer=lambda model: make_optimizer(config, model),
            rows=sum(len(ids) - start for ids, start in largest),
            several=any(len(of_step) > 1 for of_step in micros),
            dtype=dtype,
            world=world,
            sharded=config.parallel == "fsdp" and world > 1,
            recompute=config.activation_checkpointing,
        ),
    )
    parts = {name.replace("_", " "): getattr(found, name) for name in estimate.PARTS} | {"process": process}
    shown = {
        "updates": steps,
        "tokens": int(tokens * world),
        "parameters": found.parameters,
        "trained parameters": found.trained,
        "FLOPs": f"{found.flops / max(1, _tokens(largest)) * tokens * world:.2e}",
        "devices": f"{world} ({config.parallel})" if world > 1 else 1,
        "largest micro-batch": f"{_tokens(largest)} tokens",
    }
    memory = {f"memory: {name}": _size(size) for name, size in parts.items()}
    return head | shown | memory | {"memory of a device": _size(sum(parts.values()))}


def plan_of_pairs(config: PairPlanOptions, kind: str, loss: Callable, *shuffle: str) -> dict[str, Any]:
    """The plan of a training on preferences, in the order of `pairs.pair_stream`."""
    rows, _ = load_rows(config, "preferences")
    data = encode_pairs(rows, setup.codec_of(config), Limits(config.max_length, config.max_prompt_length))
    seqs, stream = pairs.sequences(data), pairs.pair_stream(data, config, *shuffle)

    def micros(step: int) -> list[Sequences]:
        world = config.plan_world_size or 1
        batches = pairs.micro_batches(data, stream.batch(step), config.tokens_per_batch, 0, world)
        return [[seqs[i] for i in batch.completions] for batch in batches]

    head = {"pairs": len(data.pairs), "prompts": len(data.prompts), "completions": len(data.completions)}
    return plan_of_training(config, kind, stream.steps, micros, loss, **head)


def _build(config: AdapterOptions, kind: str) -> Any:
    model = untrained(config.model, kind, revision=config.revision)
    if config.quantize:
        quantized.plan(model, config.quantize)
    setup.adapt(config, model, {"policy": "CAUSAL_LM", "reward": "SEQ_CLS"}[kind])
    return model


def _tokens(sequences: Sequences) -> int:
    """Tokens of a micro-batch, each prompt counted once."""
    prompts = {tuple(ids[:start]) for ids, start in sequences}
    return sum(map(len, prompts)) + sum(len(ids) - start for ids, start in sequences)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
