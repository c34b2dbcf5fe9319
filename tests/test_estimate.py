"""The memory that --dry-run tells against what a run takes, and against arithmetic."""

import json
import random
import subprocess
import sys

import pytest
import torch

from dpoctl.models.load import untrained
from dpoctl.models.logprobs import summed_logps
from dpoctl.training import estimate

SEQUENCES = [(list(range(5, 45)), 5), (list(range(5, 35)), 5), (list(range(50, 99)), 3)]


def of(folder, **settings) -> estimate.Estimate:
    update = {
        "loss": lambda model: summed_logps(model, SEQUENCES).sum(),
        "optimizer": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        "rows": 107,
        "several": True,
        "dtype": torch.float32,
    }
    return estimate.estimate(lambda: untrained(str(folder), "policy"), estimate.Update(**(update | settings)))


def test_parts_by_arithmetic(prefs):
    found = of(prefs.folder / "sft")
    parameters = sum(p.numel() for p in untrained(str(prefs.folder / "sft"), "policy").parameters())
    assert found.parameters == found.trained == parameters
    assert found.weights == found.gradients == 4 * parameters
    assert found.optimizer == pytest.approx(8 * parameters, rel=1e-3)
    tokens = 45 + 25 + 49 - 3  # a prompt shared once; the last token of a response is not forwarded
    assert found.flops == pytest.approx(6 * parameters * tokens, rel=0.5)
    less = of(prefs.folder / "sft", recompute=True)
    assert less.activations < 0.8 * found.activations and less.flops > found.flops
    shared = of(prefs.folder / "sft", world=4, sharded=True)
    assert shared.optimizer == pytest.approx(found.optimizer / 4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width", "vocabulary"), [(4, 256, 8192), (6, 384, 50257), (12, 768, 50257)])
def test_within_a_fifth_of_the_measured_peak(tmp_path, layers, width, vocabulary):
    """train-dpo on GPT-2 shapes of 5, 30 and 124 million parameters with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=512,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "lm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        tmp_path / "lm"
    )
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(n))

    rows = [{"prompt": text(150), "chosen": " " + text(40), "rejected": " " + text(50)} for _ in range(32)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = (
        "train-dpo --model lm --data prefs.jsonl --batch-size 16 --max-steps 2 --epochs 9 "
        "--tokens-per-batch 2048 --warmup-steps 0 --cache-dir cache --out run -q"
    ).split()

    def run(*more: str) -> str:
        command = [sys.executable, "-m", "dpoctl", *args, *more]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    told = next(line for line in run("--dry-run").splitlines() if line.startswith("memory of a device"))
    run()
    measured = json.loads((tmp_path / "run/manifest.json").read_text())["cost"]["peak_memory_bytes"] / 1e9
    print(f"{layers} layers of {width}: told {told.split()[-2]} GB, measured {measured:.2f} GB")
    assert float(told.split()[-2]) == pytest.approx(measured, rel=0.2)
