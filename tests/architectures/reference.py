"""The same numbers from plain torch and transformers: one text at a time, float64 and eager attention where they work.

Nothing of dpoctl is used here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

Text = tuple[list[int], int]  # token ids, and where the completion begins


@dataclass
class Step:
    """An update as it is logged: the loss and the norm of its gradient, before clipping."""

    loss: float
    norm: float


def load(folder: Path, cls: Any = AutoModelForCausalLM, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model of a directory, in float64 and with eager attention where the architecture has them.

    Falcon's ALiBi is another one with eager attention, which scales it once more, than with the default that runs.
    """
    if getattr(AutoConfig.from_pretrained(folder), "alibi", False):
        return cls.from_pretrained(folder, dtype=dtype).eval()
    for options in (
        {"dtype": dtype, "attn_implementation": "eager"},
        {"dtype": dtype},
        {"dtype": torch.float32, "attn_implementation": "eager"},
        {"dtype": torch.float32},
    ):
        try:
            model = cls.from_pretrained(folder, **options).eval()
            model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
            return model
        except (ValueError, RuntimeError, TypeError):
            continue
    raise AssertionError(f"{folder} cannot be loaded")


def encode(tokenizer: Any, prompt: str, completion: str) -> Text:
    """Prompt, completion and EOS."""
    before, every = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    assert every[: len(before)] == before
    return [*every, tokenizer.eos_token_id], len(before)


def summed_logp(model: PreTrainedModel, text: Text) -> torch.Tensor:
    """The log-prob of a completion."""
    ids, start = text
    logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return logps[range(start - 1, len(ids) - 1), ids[start:]].sum()


def dpo_updates(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: list[tuple[Text, Text]],
    *,
    beta: float,
    lr: float,
    steps: int,
    clip: float,
    also: Callable[[PreTrainedModel], torch.Tensor] | None = None,
) -> list[Step]:
    """Full-batch updates of DPO (2305.18290, eq. 7) by AdamW; `also` gives a term that is added to the loss."""
    with torch.no_grad():
        known = [[summed_logp(reference, text) for text in pair] for pair in pairs]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    done = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = []
        for (chosen, rejected), (ref_chosen, ref_rejected) in zip(pairs, known, strict=True):
            c, r = summed_logp(policy, chosen) - ref_chosen, summed_logp(policy, rejected) - ref_rejected
            losses.append(-F.logsigmoid(beta * (c - r)))
        loss = torch.stack(losses).mean()
        if also is not None:
            loss = loss + also(policy)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
        optimizer.step()
        done.append(Step(loss.item(), norm.item()))
    return done


def balance_loss(pairs: list[tuple[Text, Text]], coefficient: float) -> Callable[[PreTrainedModel], torch.Tensor]:
    """The load-balancing loss of transformers over the padded batch of both texts of every pair."""
    texts = [ids for pair in pairs for ids, _ in pair]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])

    def of(model: PreTrainedModel) -> torch.Tensor:
        output = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        return coefficient * output.aux_loss

    return of


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """What `generate` continues a prompt with, alone, without its EOS (id 0)."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return found[: found.index(0)] if 0 in found else found


@torch.no_grad()
def rewards(folder: Path, texts: list[list[int]]) -> list[float]:
    """The normalised rewards of a reward model's directory, one text at a time and in one padded batch."""
    model = load(folder, AutoModelForSequenceClassification, torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    raw = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0].item() for ids in texts]
    if "longrope" not in str(getattr(config, "rope_parameters", None)):  # there, a batch changes the numbers
        batch = tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt")
        padded = model(**batch, use_cache=False).logits[:, 0]
        assert torch.allclose(padded, torch.tensor(raw), rtol=1e-3, atol=1e-3)
    return [(value - config.reward_shift) / config.reward_scale for value in raw]
