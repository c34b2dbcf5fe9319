"""Train a reward model on preferences by Bradley-Terry, keep the best by validation, centre it on the reference."""

from dataclasses import replace
from typing import Any

import torch

from .. import log
from ..config.training import TrainRM
from ..data.encode import PairData, encode_pairs
from ..data.schema import load_rows
from ..data.tokens import encode_completion, encode_prompt, fingerprint
from ..errors import InputError
from ..models.load import load_reward_start
from ..models.logprobs import Sequences
from ..models.rewards import last_token_rewards, rewards_of
from ..objectives.reward import bradley_terry, calibration
from ..outputs import claims
from ..runtime import collectives, devices
from ..training import loop, pairs, setup
from ..training.plan import plan_of_pairs

_MARGIN_EDGES = (0.0, 0.1, 0.25, 0.5, float("inf"))  # of the rows' score margins, for accuracy by margin
_EVALUATIONS_PER_EPOCH = 4


def run(config: TrainRM, output: claims.Output) -> None:
    device, dtype = setup.open_device(config, output)
    options = {"seed": config.seed, "revision": config.revision, "trust_remote_code": config.trust_remote_code}
    model, tokenizer = setup.load(
        config, device, lambda place: load_reward_start(config.model, device=place, **options)
    )
    adapters = setup.adapt(config, model, "SEQ_CLS")
    setup.share(config, model, device, dtype)
    data, held_out = _split(config, model, tokenizer)
    stream = pairs.pair_stream(data, config)
    if config.eval_every is None:
        per_epoch = max(1, len(data.pairs) // (config.batch_size * _EVALUATIONS_PER_EPOCH))
        config = replace(config, eval_every=per_epoch)
    seqs, held_seqs = (pairs.sequences(d) for d in (data, held_out))

    def micro_batches(step: int) -> list[pairs.PairBatch]:
        return pairs.micro_batches(
            data, stream.batch(step), config.tokens_per_batch, collectives.rank(), collectives.world_size()
        )

    def loss(batch: pairs.PairBatch) -> tuple[torch.Tensor, dict]:
        rewards = last_token_rewards(model, [seqs[i] for i in batch.completions])
        w, l = batch.pairs.to(device).unbind(1)  # noqa: E741
        margin = _margins(data, batch.rows).to(device) if config.use_margins else 0.0
        return bradley_terry(rewards[w], rewards[l], margin).sum() / batch.n_global, _metrics(rewards, w, l)

    def evaluate() -> dict[str, float]:
        with devices.autocast(device, dtype):
            metrics, _ = _validate(model, held_out, held_seqs, config)
        return metrics

    def wrap_up() -> dict[str, Any]:
        """Centre the rewards, then say how good the model that is kept is, by score margin and by confidence."""
        with devices.autocast(device, dtype):
            shift, scale = _moments(config, model, tokenizer, seqs)
            metrics, details = _validate(model, held_out, held_seqs, config)
        model.config.reward_shift, model.config.reward_scale = shift, scale
        log.say(
            f"held-out accuracy {metrics['accuracy']:.3f} on {len(held_out.pairs)} pairs of prompts not trained on; "
            f"rewards shifted by {shift:.3f}, divided by {scale:.3f}"
        )
        for low, high, accuracy, n in details["accuracy_by_margin"]:
            log.say(f"  score margin {low:g} to {high:g}: {accuracy:.3f} of {n}")
        shown = {f"eval/{name}": value for name, value in metrics.items()}
        return shown | details | {"reward_shift": shift, "reward_scale": scale}

    def watch(row: dict[str, float]) -> None:
        if row["step"] == 1:
            log.say(f"update 1: loss {row['loss']:.4f} (log 2 is 0.6931), accuracy {row['accuracy']:.3f}")

    task = loop.Task(
        steps=stream.steps,
        count="pairs",
        epoch=stream.epoch,
        micro_batches=micro_batches,
        loss=loss,
        idle=lambda: last_token_rewards(model, [([0, 0], 1)]).sum(),
        tokens=lambda batch: pairs.batch_tokens(data, batch),
        where=lambda step: "rows at lines " + loop.listed(data.lines[i] for i in stream.batch(step)),
        evaluate=evaluate,
        best="accuracy" if config.select == "best" else "",
        wrap_up=wrap_up,
        watch=watch,
        saved=adapters,
        notes=dict(data.counts) | {"train_pairs": len(data.pairs), "validation_pairs": len(held_out.pairs)},
    )
    loop.train(model, tokenizer, task, config, output, device, dtype)


def _split(config: TrainRM, model, tokenizer) -> tuple[PairData, PairData]:
    """(training, validation) pairs; no prompt is in both."""
    max_length, max_prompt = setup.lengths(config, model)

    def encode(path: str) -> PairData:
        rows = load_rows(path, "preferences", skip_bad=config.skip_bad_rows)
        return encode_pairs(rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt)

    data = encode(config.data)
    if config.eval_data is None:
        data, held_out = pairs.split_by_prompt(data, config.validation, config.seed)
    else:
        every = encode(config.eval_data)
        held_out = pairs.without_prompts(every, data)
        if dropped := len(every.pairs) - len(held_out.pairs):
            log.warn(
                f"{config.eval_data}: {dropped} of {len(every.pairs)} pairs left out: their prompts are trained on"
            )
        if not held_out.pairs:
            raise InputError(f"{config.eval_data}: every prompt in it is trained on", "leave --eval-data out")
    log.say(f"{config.data}: {len(data.pairs)} pairs to train on, {len(held_out.pairs)} of other prompts held out")
    return data, held_out


def _margins(data: PairData, rows: list[int]) -> torch.Tensor:
    missing = [data.lines[i] for i in rows if data.margins[i] is None]
    if missing:
        raise InputError(f"line {missing[0]}: --use-margins needs a margin in every row", "or leave it out")
    return torch.tensor([data.margins[i] for i in rows])


def _metrics(rewards: torch.Tensor, w: torch.Tensor, l: torch.Tensor) -> dict:  # noqa: E741
    """Sums and weights of the log: accuracy and margin over pairs, the reward over completions, its extremes."""
    rewards = rewards.detach()
    margin = rewards[w] - rewards[l]
    return {
        "accuracy": ((margin > 0).double().sum().item(), float(len(w))),
        "margin": (margin.double().sum().item(), float(len(w))),
        "mean_reward": (rewards.double().sum().item(), float(len(rewards))),
        "min_reward": (rewards.min().item(), min),
        "max_reward": (rewards.max().item(), max),
    }


def _validate(model, data: PairData, seqs: Sequences, config) -> tuple[dict[str, float], dict[str, Any]]:
    """(figures of the log, accuracy by score margin and by confidence) on held-out pairs."""
    used = sorted({i for pair in data.pairs for i in pair})
    values = rewards_of(model, [seqs[i] for i in used], tokens_per_batch=config.tokens_per_batch)
    rewards = dict(zip(used, values.tolist(), strict=True))
    chosen, rejected = (torch.tensor([rewards[pair[side]] for pair in data.pairs]) for side in (0, 1))
    margin = chosen - rejected
    error, bins = calibration(margin)
    right = (margin > 0).double()
    metrics = {
        "loss": bradley_terry(chosen, rejected).mean().item(),
        "accuracy": right.mean().item(),
        "margin": margin.mean().item(),
        "mean_reward": values.mean().item(),
        "min_reward": values.min().item(),
        "max_reward": values.max().item(),
        "calibration_error": error,
    }
    by_margin = []
    for low, high in zip(_MARGIN_EDGES, _MARGIN_EDGES[1:], strict=False):
        own = [i for i, m in enumerate(data.margins) if m is not None and low <= m < high]
        if own:
            by_margin.append([low, min(high, 1.0), right[own].mean().item(), len(own)])
    return metrics, {"accuracy_by_margin": by_margin, "calibration": [list(b) for b in bins]}


def _moments(config: TrainRM, model, tokenizer, seqs: Sequences) -> tuple[float, float]:
    """(shift, scale) that let the rewards of the reference's completions average 0 (and deviate by 1)."""
    if config.normalize == "none":
        return 0.0, 1.0
    if config.reference_completions:
        seqs = _completion_sequences(config, model, tokenizer)
    rewards = rewards_of(model, seqs, tokens_per_batch=config.tokens_per_batch).double()
    scale = rewards.std(correction=0).item() if config.normalize == "shift-scale" else 1.0
    return rewards.mean().item(), scale or 1.0


def _completion_sequences(config: TrainRM, model, tokenizer) -> list[tuple[list[int], int]]:
    rows = load_rows(config.reference_completions, "completions", skip_bad=config.skip_bad_rows).rows
    own, found = fingerprint(tokenizer), []
    max_length, _ = setup.lengths(config, model)
    for row in rows:
        finished = row.get("finish") != "length"
        if row.get("tokenizer") == own:
            prompt = row["prompt_ids"]
            ids = prompt + row["completion_ids"] + ([tokenizer.eos_token_id] if finished else [])
        else:
            prompt = encode_prompt(tokenizer, row["prompt"])
            ids = prompt + encode_completion(tokenizer, row["prompt"], row["completion"], prompt, finished=finished)
        found.append((ids[:max_length], min(len(prompt), max_length - 1)))
    return found


def plan(config: TrainRM) -> dict:
    return plan_of_pairs(config, "reward", lambda model, sequences: last_token_rewards(model, sequences).sum())
