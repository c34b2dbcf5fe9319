"""Supervised fine-tuning: next-token loss on texts, on completions, or on one side of preferences (Preferred-FT)."""

import torch

from .. import log
from ..config.training import SFT
from ..data.batching import Stream, pack, share, shuffled
from ..data.encode import Example, encode_examples
from ..data.schema import Rows, load_rows
from ..models.logprobs import response_token_logps
from ..outputs import claims
from ..runtime import collectives, devices, fsdp
from ..training import loop, setup
from ..training.metrics import Meter
from ..training.plan import plan_of_training


def run(config: SFT, output: claims.Output) -> None:
    device, dtype = setup.open_device(config, output)
    model, tokenizer = setup.open_model(config, config.model, device)
    adapters = setup.adapt(config, model)
    setup.share(config, model, device, dtype)
    examples, counts = _encode(config, config.data, model, tokenizer)
    held_out = _encode(config, config.eval_data, model, tokenizer)[0] if config.eval_data else []
    stream = _stream(config, len(examples))

    def micro_batches(step: int) -> list[tuple[list[Example], int]]:
        batch = [examples[i] for i in stream.batch(step)]
        total = sum(len(e.ids) - e.start for e in batch)
        own = share(batch, lambda e: len(e.ids), collectives.rank(), collectives.world_size())
        return [(group, total) for group in _pack(own, config.tokens_per_batch)]

    def loss(micro) -> tuple[torch.Tensor, dict]:
        group, total = micro
        logps, _ = response_token_logps(model, [(e.ids, e.start) for e in group])
        return -logps.sum() / total, {}

    def idle() -> torch.Tensor:
        return response_token_logps(model, [([0, 0], 1)])[0].sum()

    def evaluate() -> dict[str, float]:
        meter = Meter()
        with torch.no_grad(), devices.autocast(device, dtype):
            own = share(held_out, lambda e: len(e.ids), collectives.rank(), collectives.world_size())
            for group in fsdp.in_lockstep(model, _pack(own, config.tokens_per_batch), idle):
                logps, _ = response_token_logps(model, [(e.ids, e.start) for e in group])
                meter.add("loss", -logps.double().sum().item(), float(len(logps)))
        return meter.take()

    notes = dict(counts)
    if held_out:  # of the untouched model, also where a run continues: checkpoints are loaded later
        notes["eval/loss_before"] = evaluate()["loss"]
        log.say(f"held-out loss before training: {notes['eval/loss_before']:.4f}")
    point = setup.frontier_point(
        config,
        model,
        tokenizer,
        device,
        dtype,
        method_name(config),
        config.ref or config.model,
        {tuple(e.ids[: e.start]) for e in examples},
    )
    task = loop.Task(
        steps=stream.steps,
        epoch=lambda step: stream.epoch(step),
        micro_batches=micro_batches,
        loss=loss,
        idle=idle,
        tokens=lambda micro: sum(len(e.ids) for e in micro[0]),
        where=lambda step: "rows at lines " + loop.listed(examples[i].line for i in stream.batch(step)),
        evaluate=evaluate if held_out else None,
        point=point,
        saved=adapters,
        notes=notes,
    )
    loop.train(model, tokenizer, task, config, output, device, dtype)


def method_name(config: SFT) -> str:
    return "preferred-ft" if config.field else "sft"


def _stream(config: SFT, n: int) -> Stream:
    return Stream(n, config.batch_size, config.epochs, config.max_steps, shuffled(config.seed, n))


def _pack(examples: list[Example], tokens: int) -> list[list[Example]]:
    return pack(examples, lambda e: len(e.ids), lambda e: len(e.ids), tokens)


def _rows(config: SFT, path: str) -> Rows:
    return load_rows(path, "preferences" if config.field else "text", skip_bad=config.skip_bad_rows)


def _encode(config: SFT, path: str, model, tokenizer) -> tuple[list[Example], dict[str, int]]:
    max_length, max_prompt = setup.lengths(config, model)
    examples, counts = encode_examples(
        _rows(config, path),
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt,
        field=config.field,
        overlong=config.overlong,
    )
    tokens = sum(len(e.ids) for e in examples)
    log.say(
        f"{path}: {len(examples)} rows, {tokens} tokens"
        + (f", {counts['truncated']} cut to length" if counts["truncated"] else "")
    )
    return examples, counts


def plan(config: SFT) -> dict:
    examples, _ = encode_examples(
        _rows(config, config.data),
        setup.load_tokenizer(config),
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        field=config.field,
        overlong=config.overlong,
    )
    stream = _stream(config, len(examples))

    def micros(step: int) -> list[list[tuple[list[int], int]]]:
        own = share([examples[i] for i in stream.batch(step)], lambda e: len(e.ids), 0, config.plan_world_size or 1)
        return [[(e.ids, e.start) for e in group] for group in _pack(own, config.tokens_per_batch)]

    def loss(model, sequences) -> torch.Tensor:
        return -response_token_logps(model, sequences)[0].sum()

    return plan_of_training(config, "policy", stream.steps, micros, loss, rows=len(examples))
