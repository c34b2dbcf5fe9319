"""Ids, log-probs and rewards from plain torch and transformers, in float64, one text at a time.

Nothing of dpoctl is used here.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

Sequence = tuple[list[int], int]  # token ids, and where the completion begins


def load(folder: Path, cls: Any = AutoModelForCausalLM) -> Any:
    """The model of a directory in float64, with eager attention."""
    return cls.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def load_reward_model(folder: Path) -> Any:
    """The sequence classifier of a directory."""
    return load(folder, AutoModelForSequenceClassification)


def prompt_ids(tokenizer: Any, prompt: Any, **arguments: Any) -> list[int]:
    """The ids of a prompt: text as the tokenizer encodes it, messages up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **arguments)


def answer_ids(tokenizer: Any, prompt: Any, answer: str, ends: set[int], **arguments: Any) -> Sequence:
    """Prompt and answer up to the first of the `ends`, which the template writes; after a text, the tokenizer's EOS."""
    before = prompt_ids(tokenizer, prompt, **arguments)
    if isinstance(prompt, str):
        ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    else:
        messages = [*prompt, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False, **arguments)
    assert ids[: len(before)] == before and len(ids) > len(before)
    return ids[: next(n for n in range(len(before), len(ids)) if ids[n] in ends) + 1], len(before)


@torch.no_grad()
def token_logps(model: Any, sequence: Sequence) -> torch.Tensor:
    """The log-prob of each token of a completion."""
    ids, start = sequence
    logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return logps[range(start - 1, len(ids) - 1), ids[start:]]


def summed_logps(model: Any, sequences: list[Sequence]) -> torch.Tensor:
    """The log-prob of each completion."""
    return torch.stack([token_logps(model, sequence).sum() for sequence in sequences])


@torch.no_grad()
def exact_kl(policy: Any, reference: Any, sequence: Sequence) -> float:
    """The KL over the vocabulary, summed over the positions at which a completion's tokens are drawn."""
    ids, start = sequence
    p, q = (m(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1) for m in (policy, reference))
    return (p.exp() * (p - q)).sum(-1)[start - 1 : len(ids) - 1].sum().item()


def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> float:
    """The mean loss of DPO (2305.18290, eq. 7) for log-ratios of chosen and rejected completions."""
    return -F.logsigmoid(beta * (chosen - rejected)).mean().item()


@torch.no_grad()
def reward(model: Any, ids: list[int]) -> float:
    """The logit of a sequence classifier with one label, as transformers reads it from a text alone."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0].item()
