"""What training tasks share before the loop: joining ranks, loading, adapters, sharding, lengths."""

import sys
from collections.abc import Callable
from typing import Any

from .. import log
from ..data.chats import TemplateOptions
from ..data.codec import Codec
from ..data.encode import Limits
from ..errors import InputError
from ..inference import decoding
from ..inference.options import template_options
from ..models import adapter, lora, packed, precision, probes, quantized, rope, shared_weights
from ..models.blocks import shards
from ..models.hub import is_adapter, resolve, resolve_base
from ..models.load import Loaded, context_length, load_policy
from ..models.place import Place
from ..models.pretrained import silence_transformers
from ..models.probes import can_pack, has_plain_head
from ..models.tokenizers import load_codec
from ..outputs import adapter_base
from ..outputs.claims import Output
from ..outputs.files import sha256_path
from ..runtime import collectives, fsdp
from ..runtime.devices import Compute
from ..runtime.joining import open_together
from ..runtime.long_work import long_work
from ..runtime.sharing import on_rank_0, raise_on_every_rank
from .options import (
    AdapterOptions,
    CodecOptions,
    ComputeOptions,
    LengthOptions,
    LoadingOptions,
    LoraOptions,
    ShardedTextOptions,
    ShardingOptions,
    TrainedModelOptions,
)


def open_training(config: ComputeOptions, output: Output) -> Compute:
    """The device and precision of a training command.

    Under torchrun the ranks join here, and learn from rank 0 whether `output` is resumed.
    """
    silence_transformers()
    compute, output.resuming = open_together(config.device, config.dtype, output.resuming, config.rank_timeout)
    return compute


def open_trained(config: TrainedModelOptions, compute: Compute, templates: TemplateOptions) -> Loaded:
    """The causal language model of --model with float32 weights, in main memory as `load` says.

    Weights that are quantised are on the device already. With --lora, of an adapter it is the base, which `adapt`
    completes.
    """
    options: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "templates": templates,
    }
    return load(config, trained_at(config, compute), lambda place: load_policy(config.model, place, **options))


def trained_at(config: TrainedModelOptions, compute: Compute) -> Place:
    """Where and how the model to train is loaded: in main memory, and with --lora apart from its adapter."""
    return Place(quantize=config.quantize, quantized_at=compute.device, apart=bool(config.lora))


def open_frozen(
    config: LoadingOptions, compute: Compute, path: str, revision: str | None, templates: TemplateOptions
) -> Loaded:
    """A causal language model that is not trained, such as the reference, held in the compute dtype or --quantize."""
    options: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "templates": templates,
    }
    held = Place(compute.device, compute.dtype, config.quantize)
    return load(config, held, lambda place: load_policy(path, place, **options))


def open_in_float32(
    config: LoadingOptions, compute: Compute, path: str, revision: str | None, templates: TemplateOptions
) -> Loaded:
    """A causal language model with float32 weights that is not trained by gradients: a reference that moves."""
    options: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "templates": templates,
    }
    return load(config, Place(compute.device), lambda place: load_policy(path, place, **options))


def load(config: ShardingOptions, place: Place, load_at: Callable[[Place], Any]) -> Any:
    """`load_at(place)`; a model to be sharded, in main memory on rank 0 and as shapes on the others.

    An InputError of one rank is raised on every rank: of a model to be sharded only rank 0 has seen the weights.
    """
    if _is_sharded_run(config):
        place = place._replace(device="meta" if collectives.rank() else "cpu")
    found, error = None, None
    with long_work():
        try:
            found = load_at(place)
        except InputError as e:
            error = e
    raise_on_every_rank(error)
    return found


def content_of(path: str, revision: str | None) -> str:
    """SHA-256 of a model's files, which rank 0 hashes for every rank. Raises InputError as `resolve` does."""
    return on_rank_0(lambda: sha256_path(resolve(path, revision)))


def _is_sharded_run(config: ShardingOptions) -> bool:
    return config.parallel == "fsdp" and collectives.world_size() > 1


def place(config: ShardedTextOptions, model: Any, compute: Compute) -> None:
    """Move the model to train to its device, or shard it; its frozen weights are held in the compute dtype first.

    Raises InputError as `shard_model` does.
    """
    precision.hold(model, compute.dtype)
    if _is_sharded_run(config):
        shard_model(config, model, compute)
    elif not quantized.is_quantized(model):
        model.to(compute.device)


def shard_model(config: ShardedTextOptions, model: Any, compute: Compute) -> None:
    """Shard a model with --parallel fsdp.

    Raises InputError as `fsdp.shard` and `shards` do, and where the texts' lengths decide on the rotary frequencies.
    """
    if not _is_sharded_run(config):
        return
    # What is tried on a model's full weights, rank 0 tries for all.
    context = context_length(model)
    sampled = _sampled_length(config)
    longest = min(max(config.max_length, sampled), context or sys.maxsize)
    switch = rope.switch_of(model)
    if switch and switch.length < longest:
        raise InputError(
            f"--parallel fsdp: the model has other rotary frequencies from {switch.length + 1} tokens on, so that "
            "ranks would need different numbers of forward passes",
            hint=f"--max-length {switch.length}, with room for --max-new-tokens at points of the frontier; or "
            "--parallel ddp",
        )
    packs, plain, mode = on_rank_0(lambda: _tried(model, longest, min(sampled, longest), compute))
    probes.assume(model, packs=packs, plain_head=plain)
    if mode:
        decoding.assume_mode(model, mode)
    fsdp.shard(model, shards(model), compute.device, compute.dtype)


def _sampled_length(config: ShardedTextOptions) -> int:
    """The most tokens of a prompt of --eval-prompts with its completion; 0 where nothing is sampled."""
    new = getattr(config, "max_new_tokens", 0) if getattr(config, "eval_prompts", None) else 0
    return config.max_prompt_length + new if new else 0


def _tried(model: Any, longest: int, sampled: int, compute: Compute) -> tuple[bool, bool, decoding.Mode | None]:
    """(whether a model can be packed, whether its head is plain, how its samples are decoded, None without any).

    Raises InputError as `probes.require_causal` does.

    The model is in main memory; the kernel that will attend is tried on the device.
    """
    packs = can_pack(model, longest)
    if packs and packed.uses_flex(compute.device):
        packs = probes.has_attention_kernel(model, longest, compute.device, compute.dtype, learns=True)
    if not packs:
        probes.require_causal(model)
    return packs, has_plain_head(model), decoding.mode_of(model, sampled) if sampled else None


def adapt(config: AdapterOptions, model: Any, task: str = "CAUSAL_LM") -> Any:
    """peft's wrapper of a model whose adapters are trained, and which saves them; None without --lora.

    Where --model is an adapter, `model` is its base, and that adapter is trained. Raises InputError as `lora.adapt` and
    `lora.resume` do, and for a quantised model that cannot be trained so.
    """
    if not config.lora:
        quantized.refuse_full_training(model, config.model)
        return None
    quantized.require_trainable(model, config.model)
    start = resolve(config.model, config.revision, weights=False)
    path, revision, folder = config.model, config.revision, start
    if is_adapter(start):
        found = on_rank_0(lambda: adapter_base.find(start))
        path, revision = found.path, found.revision
        folder = resolve_base(config.model, path, revision, weights=False)
    method = quantized.method_of(folder)
    base = on_rank_0(
        lambda: adapter_base.describe(path, folder, revision, quantized=method, trained_in=config.quantize)
    )
    if is_adapter(start):
        wrapper = lora.resume(model, adapter.read(start), lora_settings(config), base.path, task)
    else:
        wrapper = lora.adapt(model, lora_settings(config), base.path, task)
    wrapper._dpoctl_base = base  # saved beside the adapters
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start_of = f" continue {config.model}" if is_adapter(start) else ""
    log.say(f"adapters of rank {config.lora}{start_of}: {trained:,} weights are trained, the others are frozen")
    return wrapper


def frozen_start(config: ShardingOptions, policy: Any) -> Any:
    """The policy with its adapters as they are before training, on its own frozen weights; None where it is sharded.

    Called before the first update, and before a checkpoint is loaded.
    """
    return None if _is_sharded_run(config) else shared_weights.frozen_copy(policy)


def lora_settings(config: LoraOptions) -> lora.LoraSettings:
    """The adapters that --lora and the options beside it describe."""
    assert config.lora is not None
    return lora.LoraSettings(
        config.lora, config.lora_alpha, config.lora_targets, config.seed, config.use_dora, config.use_rslora
    )


def lengths(config: LengthOptions, model: Any) -> Limits:
    """--max-length and --max-prompt-length within the model's context; says so where a shorter context lowers them."""
    return limits_within(context_length(model), config.max_length, config.max_prompt_length)


def limits_within(context: int | None, max_length: int, max_prompt_length: int) -> Limits:
    """The limits of training within a model's context; says so where a shorter context lowers them."""
    if context is None or max_length <= context:
        return Limits(max_length, max_prompt_length)
    prompt = min(max_prompt_length, context // 2)
    log.say(f"the model's context lowers --max-length to {context}, --max-prompt-length to {prompt}")
    return Limits(context, prompt)


def codec_of(config: CodecOptions) -> Codec:
    """How text becomes the token ids of --model, whose weights are not loaded."""
    return load_codec(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        templates=template_options(config),
    )
