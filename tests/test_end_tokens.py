"""The token that ended a sample is kept everywhere: a sequence KL in closed form, by evaluate, train-dpo and train-ppo.

A model whose weights are all 0 draws each token from the biases of its head. The policy goes on with p = .5 and ends
with `turn` (.49) or `end` (.01), the reference with .5, .25 and .25. A sample has 2 tokens on average (the cut at 64
tokens is out of reach), and a step's KL is .49 ln(.49/.25) + .01 ln(.01/.25), which makes 0.5951 of a sequence.
"""

import json
import math
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from helpers.chain import World

WORDS = ("go", "red", "turn", "end")
POLICY, REFERENCE = (0.5, 0.49, 0.01), (0.5, 0.25, 0.25)
RIGHT = 2 * sum(p * math.log(p / q) for p, q in zip(POLICY, REFERENCE, strict=True))
SPREAD = math.sqrt(0.98 * 0.02) * (math.log(0.49 / 0.25) - math.log(0.01 / 0.25))  # of a sample's log-ratio
SCORER = "def length(rows):\n    return [len(row['completion']) for row in rows]\n"


def save(path, probabilities) -> None:
    config = GPTJConfig(vocab_size=4, n_positions=96, n_embd=8, n_layer=1, n_head=1, rotary_dim=2, eos_token_id=3)
    model = GPTJForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.lm_head.bias.copy_(torch.tensor([-50.0, *map(math.log, probabilities)]))
    model.generation_config = GenerationConfig(eos_token_id=[3, 2])
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="go"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="end").save_pretrained(path)


@pytest.fixture(scope="module")
def coins(tmp_path_factory, warm) -> World:
    world = World(tmp_path_factory.mktemp("coins"), warm)
    save(world.folder / "policy", POLICY)
    save(world.folder / "reference", REFERENCE)
    prompts = [" ".join(words) for words in product(("go", "red"), repeat=9)]
    (world.folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    pair = {"prompt": "red", "chosen": "red red", "rejected": "red"}
    (world.folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (world.folder / "length.py").write_text(SCORER)
    return world


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_right(kl: float, standard_error: float) -> None:
    assert abs(kl - RIGHT) < 2 * standard_error and standard_error < 0.05, (kl, standard_error, RIGHT)


def test_the_closed_form():
    assert pytest.approx(0.5951, abs=5e-5) == RIGHT


def test_evaluate(coins):
    coins.run(
        "evaluate --model policy --ref reference --prompts prompts.jsonl --n 8 --seed 3",
        "--scorer python:length.py:length --out eval.jsonl",
    )
    [row] = rows_of(coins.folder / "eval.jsonl")
    assert_right(row["kl"], row["kl_se"])
    assert_right(row["kl_exact"], row["kl_exact_se"])
    # The last token of a sample alone has a log-ratio: log(.49/.25) or log(.01/.25).
    assert row["kl_se"] == pytest.approx(SPREAD / math.sqrt(row["n"]), rel=0.2)


def test_samples_carry_the_token_that_ended_them(coins):
    coins.run("sample --model policy --prompts prompts.jsonl --n 1 --out samples.jsonl")
    rows = rows_of(coins.folder / "samples.jsonl")
    ends = {row["completion_ids"][-1] for row in rows}
    assert ends == {2, 3} and all(row["finish"] == "stop" for row in rows)
    assert all(set(row["completion_ids"][:-1]) <= {1} for row in rows)


def test_points_of_the_frontier_during_train_dpo(coins):
    coins.run(
        "train-dpo --model policy --ref reference --data pairs.jsonl --max-steps 1 --lr 1e-12 --batch-size 1",
        "--eval-prompts prompts.jsonl --eval-every 1 --scorer python:length.py:length --max-length 80",
        "--max-prompt-length 8 --out dpo --seed 1",
    )
    rows = rows_of(coins.folder / "dpo" / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert_right(row["kl"], row["kl_se"])
        assert_right(row["kl_exact"], row["kl_exact_se"])


def test_train_ppo(coins):
    coins.run(
        "train-ppo --model policy --ref reference --prompts prompts.jsonl --reward python:length.py:length",
        "--batch-size 2048 --minibatch-size 2048 --ppo-epochs 1 --max-steps 1 --lr 1e-12 --kl-coef 0.1",
        "--max-length 80 --max-prompt-length 16 --seed 5 --out ppo --log-every 1 --epochs 4",
    )
    [row] = rows_of(coins.folder / "ppo" / "metrics.jsonl")
    assert_right(row["objective/kl"], SPREAD / math.sqrt(2048))
