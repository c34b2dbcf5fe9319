"""Fixed inputs of the benchmark, made offline: two GPT-2 shapes with random weights, and two kinds of preference pairs.

The tokenizer knows one word for each id, so that a text of n words has n tokens for everybody who reads it.
"""

import itertools
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

SHAPES = {  # layers, width, heads, vocabulary
    "small": (6, 384, 6, 50257),
    "tiny": (4, 256, 4, 4096),
}
LONGEST = 512


FOLDER = Path(__file__).parents[2] / "work" / "bench" / "inputs"
PAIRS = {"i": 32, "ii": 16}  # of an update


def make(folder: Path) -> None:
    """policy/, reference/ (a little off the policy, so that losses differ from log 2), reward/ and the rows, by model.

    i.jsonl and ii.jsonl are the data; batch.i.jsonl and batch.ii.jsonl the first update's worth of it, on which all
    sides are timed, so that they have the same pairs in each update; prompts.jsonl is for PPO, held-out.jsonl for
    train-rm.
    """
    for name, (layers, width, heads, vocabulary) in SHAPES.items():
        out = folder / name
        if (out / "prompts.jsonl").exists():
            continue
        tokenizer = _tokenizer(vocabulary)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=LONGEST,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        policy = GPT2LMHeadModel(config)
        _save(policy, tokenizer, out / "policy")
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.002 * torch.randn_like(p))
        _save(policy, tokenizer, out / "reference")
        config.num_labels = 1
        _save(GPT2ForSequenceClassification(config), tokenizer, out / "reward")
        draw = random.Random(0)
        for data, rows in (("i", _grouped(draw, vocabulary)), ("ii", _dialogues(draw, vocabulary))):
            _write(out / f"{data}.jsonl", rows)
            _write(out / f"batch.{data}.jsonl", rows[: PAIRS[data]])
        _write(out / "held-out.jsonl", rows[-2:])
        prompts = [{"prompt_id": str(i), "prompt": _words(draw, vocabulary, 2 + i % 7)} for i in range(64)]
        _write(out / "prompts.jsonl", prompts)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")


def _save(model, tokenizer, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _grouped(draw: random.Random, vocabulary: int) -> list[dict]:
    """What make-prefs writes: 256 prompts of 2 to 8 tokens, 4 completions of 20 to 48, 6 pairs each: 1,536 pairs."""
    rows = []
    for p in range(256):
        prompt = _words(draw, vocabulary, draw.randint(2, 8))
        completions = [" " + _words(draw, vocabulary, draw.randint(20, 48)) for _ in range(4)]
        rows += [
            {"prompt_id": str(p), "prompt": prompt, "chosen": a, "rejected": b}
            for a, b in itertools.combinations(completions, 2)
        ]
    return rows


def _dialogues(draw: random.Random, vocabulary: int) -> list[dict]:
    """512 pairs with prompts of about 150 tokens and completions of about 45, 150 at most."""

    def length(mean: float, spread: float, least: int, most: int) -> int:
        return min(most, max(least, round(draw.lognormvariate(mean, spread))))

    return [
        {
            "prompt_id": str(p),
            "prompt": _words(draw, vocabulary, length(4.9, 0.5, 20, 350)),
            **{s: " " + _words(draw, vocabulary, length(3.6, 0.7, 5, 150)) for s in ("chosen", "rejected")},
        }
        for p in range(512)
    ]


def tokens_of_pairs(path: Path) -> int:
    """Tokens of a file's pairs, as a trainer that shares nothing reads them: prompt, response and EOS of either
    side."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sum(len((row["prompt"] + row[side]).split()) + 1 for row in rows for side in ("chosen", "rejected"))


def _words(draw: random.Random, vocabulary: int, n: int) -> str:
    return " ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(n))


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
