"""What training stages share before the loop: models on the device, held-out and frontier functions, the plan."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from .. import log
from ..data.schema import load_rows
from ..data.tokens import fingerprint
from ..errors import InputError
from ..inference import policy_evaluation
from ..inference.scorers import load_scorer
from ..models import lora
from ..models.load import context_length, load_policy
from ..outputs import claims
from ..runtime import collectives, devices, fsdp, rendezvous


def open_device(config, output: claims.Output | None = None) -> tuple[torch.device, torch.dtype]:
    """The device and precision of a command; a training run's ranks meet here, and hear what rank 0 found of `work`."""
    together = output is not None and collectives.world_size() > 1
    if together:
        output.resuming = rendezvous.broadcast_start(output.resuming, config.rank_timeout)
    hf_logging.set_verbosity_error()  # its advice is for its own trainers
    hf_logging.disable_progress_bar()
    device = devices.pick_device(getattr(config, "device", "cpu"))
    if together:
        collectives.join_ranks(device, config.rank_timeout)
    return device, devices.pick_dtype(getattr(config, "dtype", "float32"), device)


def open_model(config, path: str, device: torch.device):
    """(model, tokenizer) with float32 weights, where `load` wants it."""
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return load(config, device, lambda place: load_policy(path, device=place, **options))


def load(config, device: torch.device, load_at: Callable[[str], Any]) -> Any:
    """`load_at(place)`: the device; of a model that is to be sharded, main memory on rank 0 and none on the others.

    There rank 0's InputError is raised on every rank: only it has seen the weights.
    """
    if not _shards(config):
        return load_at(str(device))
    found, error = None, None
    try:
        found = load_at("meta" if collectives.rank() else "cpu")
    except InputError as e:
        error = e
    told = collectives.from_rank_0(error and (error.message, error.hint))
    if told:
        raise InputError(*told)
    if error:
        raise error
    return found


def _shards(config) -> bool:
    return getattr(config, "parallel", "ddp") == "fsdp" and collectives.world_size() > 1


def share(config, model, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model over the ranks where --parallel fsdp asks for it."""
    if _shards(config):
        fsdp.shard(model, device, dtype)


def adapt(config, model, task: str = "CAUSAL_LM"):
    """peft's wrapper of a model whose adapters are trained, and which saves them; None without --lora.

    Raises InputError as `lora.adapt` does, and for a model that is an adapter itself.
    """
    from ..models.hub import is_adapter, resolve

    if not config.lora:
        return None
    if is_adapter(resolve(config.model, config.revision, weights=False)):
        raise InputError(f"--lora: {config.model} is an adapter itself", hint="merge it first (dpoctl merge)")
    wrapper = lora.adapt(model, config, config.model, task)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.say(f"adapters of rank {config.lora}: {trained:,} weights are trained, the others frozen")
    return wrapper


def lengths(config, model) -> tuple[int, int]:
    """(max length, max prompt length) within the model's context; where a shorter context lowers them it is said."""
    context = context_length(model)
    if context is None or config.max_length <= context:
        return config.max_length, config.max_prompt_length
    prompt = min(config.max_prompt_length, context // 2)
    log.say(f"the model's context lowers --max-length to {context}, --max-prompt-length to {prompt}")
    return context, prompt


def frontier_point(
    config, model, tokenizer, device, dtype, method: str, ref: str, trained_on: set[tuple[int, ...]], learned=None
) -> Callable[[int], tuple[dict[str, Any], list[dict]]] | None:
    """The function that measures a point of the frontier at an update, where `--eval-prompts` asks for them.

    It returns a row for eval.jsonl and the completions, with their scores, that it rests on.
    The reference comes into memory for each point and leaves it again. `trained_on`: prompts' ids of the training data;
    an overlap is warned about, since a reward on seen prompts says little. `learned`: the reward that is trained on, whose
    mean goes beside the ground truth's.
    """
    if not config.eval_prompts:
        return None
    rows = load_rows(config.eval_prompts, "prompts", skip_bad=config.skip_bad_rows, limit=config.eval_limit)
    ids = policy_evaluation.prompt_ids(
        rows.rows, tokenizer, context_length(model), rows.path, rows.lines, config.max_prompt_length
    )
    seen = sum(tuple(i) in trained_on for i in ids)
    if seen:
        log.warn(f"{seen} of {len(ids)} prompts of {config.eval_prompts} are in the training data too")
    scorer = load_scorer(config.scorer, device=str(device), revision=config.revision, text=config.score_text)
    names = ("beta", "loss", "alpha", "target_kl", "kl_coef", "preset")
    options = {"seed": config.seed} | {k: getattr(config, k) for k in names if getattr(config, k, None) is not None}

    def point(step: int) -> tuple[dict[str, Any], list[dict]]:
        reference, _ = open_model(config, ref, device)
        with devices.autocast(device, dtype):
            metrics, completions = policy_evaluation.evaluate_policy(
                model, reference, tokenizer, rows.rows, ids, scorer, config, n=1, seed=config.seed
            )
        del reference
        if learned:
            metrics["learned_reward"] = sum(learned.score(completions).values) / len(completions)
        head = {"model": config.out, "method": method, "options": options, "step": step}
        row = head | {"temperature": config.temperature, "scorer": f"{scorer.name}@{scorer.score_type}"} | metrics
        kl = f", KL {row['kl']:.2f}" if row["kl"] is not None else ""
        log.say(f"update {step}: reward {row['reward']:.3f} +- {row['reward_se']:.3f}{kl}")
        return row, completions

    return point


def same_tokenizer(own, other, own_path: str, other_path: str) -> None:
    if fingerprint(own) != fingerprint(other):
        raise InputError(
            f"{other_path}: its tokenizer is not that of {own_path}, so their log-probs do not compare",
            hint="a reference has the policy's tokenizer",
        )


def count_weights(config) -> int:
    """Parameters of `config.model`, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..models.hub import base_of, is_adapter, resolve

    folder = resolve(config.model, config.revision, weights=False)
    folder = resolve(base_of(folder), weights=False) if is_adapter(folder) else folder
    try:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{config.model}: {str(e).splitlines()[0]}", hint="a directory or hub id of a causal LM"
        ) from None
    return sum(p.numel() for p in shape.parameters())


def load_tokenizer(config):
    from ..models.load import load_tokenizer

    return load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
