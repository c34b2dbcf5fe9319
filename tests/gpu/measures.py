"""What is measured on a device: numbers beside the CPU's, determinism, variants of compiled attention, sharding.

Each function returns a row of figures. The device `cpu` tries the same code.
"""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpoctl.inference.generate import PromptTokens, Sampling, generate
from dpoctl.models.blocks import blocks
from dpoctl.models.logprobs import Sequences, summed_logps
from dpoctl.models.probes import assume, can_pack
from dpoctl.runtime import collectives, fsdp
from gpu.models import SMALL
from helpers.log_probs import random_sequences
from helpers.ranks import free_port

LONGEST = 160  # tokens of a text


class Words:
    """A tokenizer whose tokens are numbers."""

    eos_token_id = 1

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def sequences(tokens: int, seed: int = 0) -> Sequences:
    """Prompts with one to four answers, of about so many tokens."""
    return random_sequences(tokens, random.Random(seed), range(2, 500))


def build(name: str) -> PreTrainedModel:
    """A model of SMALL in eval mode, the same each time, with weights large enough for distinct logits."""
    torch.manual_seed(0)
    model = SMALL[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return model


def step(model: PreTrainedModel, seqs: Sequences, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """(log-probs, gradients of a sum of them with signs) of a forward pass in `dtype` over float32 weights."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logps = summed_logps(model, seqs)
    (logps * torch.linspace(-1, 2, len(seqs), device=device)).sum().backward()
    return logps.detach().cpu(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of gradients over the norm of the second."""
    assert found.keys() == expected.keys()
    pairs = [(found[n].double().cpu(), expected[n].double().cpu()) for n in expected]
    return (sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)).sqrt().item()


def numbers(name: str, device: torch.device, tokens: int) -> dict[str, Any]:
    """Log-probs, gradients and sampled tokens of a model of SMALL, beside those of the CPU in float32."""
    seqs = sequences(tokens)
    expected, gradients = step(build(name), seqs, torch.float32)
    model = build(name).to(device)
    row: dict[str, Any] = {"packs": can_pack(model, LONGEST)}
    for packs in (True, False) if row["packs"] else (False,):
        model = build(name).to(device)
        assume(model, packs=packs, plain_head=True)
        for dtype in (torch.float32, torch.bfloat16):
            with eager_attention() as eager:
                logps, own = step(model, seqs, dtype)
            kind = f"{'packed' if packs else 'padded'} {str(dtype).removeprefix('torch.')}"
            row[f"{kind}: log-probs off"] = ((logps - expected).abs() / expected.abs()).max().item()
            row[f"{kind}: gradients off"] = off(own, gradients)
            row[f"{kind}: not compiled"] = len(eager)
    row["samples alike"] = _samples_alike(build(name), build(name).to(device), seqs)
    return row


def _samples_alike(one: PreTrainedModel, other: PreTrainedModel, seqs: Sequences) -> float:
    """Share of eight prompts that two models continue by the same 16 tokens."""
    prompts = [PromptTokens(str(i), list(ids[:start]), frozenset({1})) for i, (ids, start) in enumerate(seqs[:8])]
    sampling = Sampling(max_new_tokens=16)
    found = [generate(model, Words(), prompts, [0], sampling) for model in (one, other)]  # type: ignore[arg-type]
    return sum(a[0].ids == b[0].ids for a, b in zip(*found, strict=True)) / len(prompts)


def determinism(name: str, device: torch.device, tokens: int, runs: int) -> dict[str, Any]:
    """Are equal steps in bfloat16 equal to the bit, as torch runs them and with deterministic algorithms?"""
    model, seqs = build(name).to(device), sequences(tokens)
    row: dict[str, Any] = {}
    for asked in (False, True):
        torch.use_deterministic_algorithms(asked, warn_only=True)
        try:
            logps, grads = zip(*(_copied(step(model, seqs, torch.bfloat16)) for _ in range(runs)), strict=True)
        finally:
            torch.use_deterministic_algorithms(False)
        kind = "deterministic" if asked else "default"
        row[f"{kind}: log-probs equal"] = all(torch.equal(each, logps[0]) for each in logps)
        row[f"{kind}: gradients equal"] = all(torch.equal(each[n], grads[0][n]) for each in grads for n in grads[0])
    return row


def _copied(found: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    return found[0].clone(), {name: grad.clone() for name, grad in found[1].items()}


def recompiles(name: str, device: torch.device, shapes: int) -> dict[str, Any]:
    """Graphs that were compiled for many shapes, in the first half of them and after it."""
    from torch._dynamo.utils import counters

    model = build(name).to(device)
    can_pack(model, LONGEST)
    counts = []
    with eager_attention() as eager:
        for i in range(shapes):
            step(model, sequences(150 + 80 * i, seed=i), torch.bfloat16)
            with torch.no_grad():
                summed_logps(model, sequences(150 + 60 * i, seed=i))
            counts.append(counters["stats"]["unique_graphs"])
    half = counts[shapes // 2]
    return {"graphs": half, "graphs of further shapes": counts[-1] - half, "not compiled": len(eager)}


def sharded(name: str, device: torch.device, tokens: int) -> dict[str, Any]:
    """A model sharded by FSDP2 over a group of one rank, by NCCL or gloo, beside the whole model."""
    port = str(free_port())
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = dict(os.environ)
    os.environ.update(ranks)
    seqs = sequences(tokens)
    try:
        whole, cut = build(name).to(device), build(name)
        for model in (whole, cut):
            assume(model, packs=True, plain_head=True)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1
        )
        fsdp.shard(cut, blocks(cut), device, torch.bfloat16)
        expected, gradients = step(whole, seqs, torch.bfloat16)
        logps, own = step(cut, seqs, torch.bfloat16)
        own = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in own.items()}
        return {
            "log-probs off": ((logps - expected).abs() / expected.abs()).max().item(),
            "gradients off": off(own, gradients),
        }
    finally:
        collectives.leave_ranks()
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def eager_attention() -> Iterator[list[str]]:
    """The warnings of attention that should have been compiled and was not."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
        found.extend(str(w.message) for w in caught if "without torch.compile" in str(w.message))
