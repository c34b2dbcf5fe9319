"""The toy task's models, trained locally: a small GPT-2 and a small RoBERTa classifier, each with its own tokenizer.

They are saved as ordinary Hugging Face directories, so later stages run the same code as on real models.
"""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from .. import log
from ..outputs.files import move_into, writing
from ..runtime import signals

CONTEXT = 160
CLASSIFIER_TOKENS = 126


class _Updates(NamedTuple):
    """How many updates a model is trained for, on how many examples each, and the peak learning rate."""

    steps: int
    batch: int
    lr: float


def train_lm_tokenizer(texts: list[str], vocabulary: int = 1536) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<|endoftext|>` is BOS, EOS and padding, and no BOS is prepended."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer, texts, vocabulary, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def train_classifier_tokenizer(texts: list[str], vocabulary: int = 1536) -> PreTrainedTokenizerFast:
    """RoBERTa's scheme, `<s> text </s>` and `<pad>`, over a BPE of words whose vocabulary differs from the LM's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer, texts, vocabulary, ["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CLASSIFIER_TOKENS + 2,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(tokenizer: Tokenizer, texts: list[str], vocabulary: int, special: list[str]) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)


def build_base_lm(texts: list[str], out: Path, seed: int, *, steps: int = 400, batch: int = 16) -> float:
    """Pre-train a GPT-2 of about 0.4M parameters on `texts`; returns the mean of its last 20 losses, nats/token."""
    tokenizer = train_lm_tokenizer(texts)
    eos = tokenizer.eos_token_id
    ids = [tokenizer(t)["input_ids"][: CONTEXT - 1] + [eos] for t in texts]
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=96,
        n_layer=2,
        n_head=3,  # of 32 numbers: kernels of other engines have no smaller ones
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, as one kernel
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)

    last = _fit("base language model", model, ids, partial(_lm_loss, model, eos), seed, _Updates(steps, batch, 5e-3))
    _save(model, tokenizer, out)
    return last


def _lm_loss(model: PreTrainedModel, pad: int, rows: list[list[int]]) -> torch.Tensor:
    """Mean negative log-likelihood per token of token ids."""
    padded, real = _pad(rows, pad)
    logits = model(input_ids=padded, attention_mask=real).logits[:, :-1]
    targets = padded[:, 1:].masked_fill(real[:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def build_classifier(reviews: list[dict], out: Path, seed: int, *, steps: int = 700, batch: int = 32) -> float:
    """Train a RoBERTa classifier (NEGATIVE, POSITIVE) on full reviews and some prefixes; returns held-out accuracy.

    A tenth of the reviews is held out. The targets are each review's probability `positive`, not its label: hard labels
    leave the classifier's confidence, and so its ranking of two good reviews, to chance.
    """
    tokenizer = train_classifier_tokenizer([r["text"] for r in reviews])
    held_out = len(reviews) // 10
    rows = [(_words(r["text"]), r["positive"], int(r["label"] == "POSITIVE")) for r in reviews]
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=CLASSIFIER_TOKENS + 4,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = RobertaForSequenceClassification(config)
    logits = partial(_logits, model, tokenizer)
    loss = partial(_classifier_loss, logits, random.Random(f"classifier {seed}"))
    _fit("sentiment classifier", model, rows[held_out:], loss, seed, _Updates(steps, batch, 2e-3))
    model.eval()
    with torch.no_grad():
        held = rows[:held_out]
        guesses = torch.cat([logits([" ".join(w) for w, *_ in held[i : i + 64]]) for i in range(0, len(held), 64)])
    _save(model, tokenizer, out)
    return (guesses.argmax(-1) == torch.tensor([y for *_, y in held])).float().mean().item()


def _logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """The classifier's logits [N, 2]."""
    ids = tokenizer(texts, truncation=True, max_length=CLASSIFIER_TOKENS + 2)["input_ids"]
    padded, real = _pad(ids, tokenizer.pad_token_id)
    return model(input_ids=padded, attention_mask=real).logits


def _classifier_loss(
    logits: Callable[[list[str]], torch.Tensor], rng: random.Random, rows: list[tuple[list[str], float, int]]
) -> torch.Tensor:
    """Mean cross-entropy to the probability `positive`; a tenth of the reviews are cut to a prefix."""
    texts = [" ".join(w[: rng.randint(len(w) // 2, len(w))] if rng.random() < 0.1 else w) for w, *_ in rows]
    return F.cross_entropy(logits(texts), torch.tensor([[1 - p, p] for _, p, _ in rows]))


def _words(text: str) -> list[str]:
    return text.split()


def _pad(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], 1 where real [B, T]) padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    real = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return ids, real


def _fit(
    what: str,
    model: torch.nn.Module,
    data: list,
    loss: Callable[[list], torch.Tensor],
    seed: int,
    updates: _Updates,
) -> float:
    """AdamW on random batches, one learning-rate cycle; returns the mean loss of the last 20 updates."""
    steps, batch, lr = updates
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    rng = random.Random(f"{what} {seed}")
    last: list[float] = []
    model.train()
    with log.progress(what, steps, "updates") as meter:
        for _ in range(steps):
            value = loss(rng.sample(data, min(batch, len(data))))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            signals.at_boundary(f"part of the {what}'s training, which a rerun restarts")
            last = [*last[-19:], value.item()]
            meter.advance(1, loss=f"{last[-1]:.3f}")
    return sum(last) / len(last)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model and tokenizer as an ordinary Hugging Face directory, each file complete or absent."""
    tmp = out / ".saving"
    shutil.rmtree(tmp, ignore_errors=True)
    model.eval()
    with writing(out, sum(p.numel() * p.element_size() for p in model.parameters())):
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        move_into(tmp, out)
