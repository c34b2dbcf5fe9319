"""Training, sampling, rewards and the saved directory of many architectures, against plain transformers.

`make test` runs a share: one of each kind. `make test-architectures` runs all of them.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from architectures import reference, zoo
from dpoctl.cli.app import run as command_line
from dpoctl.models.load import load_policy
from dpoctl.models.place import Place

SHARE = ("llama", "gemma2-small-logits", "phi3-longrope", "qwen2-moe", "mixtral", "qwen3.5", "mamba")
BETA, LR, CLIP = 0.3, 1e-3, 10.0


@pytest.fixture(
    scope="module",
    params=[
        name if name in SHARE else pytest.param(name, marks=pytest.mark.architectures) for name in zoo.ARCHITECTURES
    ],
)
def place(request, tmp_path_factory) -> tuple[str, Path]:
    """(architecture, folder with `policy`, `ref` and pairs.jsonl), as the working directory."""
    folder = tmp_path_factory.mktemp(request.param)
    zoo.save(folder / "policy", request.param)
    zoo.save(folder / "ref", request.param, perturbed=True)
    write(folder / "pairs.jsonl", make_pairs())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield request.param, folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words(draw: random.Random, low: int, high: int) -> str:
    return "".join(f" {draw.choice(zoo.WORDS)}" for _ in range(draw.randint(low, high)))


def make_pairs() -> list[dict]:
    """Three prompts of different lengths with three completions each, all pairs: completions share prompts."""
    draw, rows = random.Random(3), []
    for number, longest in enumerate((3, 9, 16)):
        prompt = f"Text {number}:{words(draw, 2, longest)}"
        first, *others = [words(draw, 1, 9) for _ in range(3)]
        for chosen, rejected in ((first, others[0]), (first, others[1]), (others[0], others[1])):
            rows.append({"prompt_id": f"t{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def has_reward_model(kind: str) -> bool:
    """Whether transformers has a classifier of a model type that is a trunk and one linear layer."""
    return kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and kind != "modernbert-decoder"


def near(found: float, expected: float, relative: float) -> bool:
    return abs(found - expected) <= relative * max(abs(expected), 1e-6)


def test_dpo_trains_and_saves_what_plain_transformers_gives(place):
    name, folder = place
    args = f"--epochs 2 --batch-size 9 --warmup-steps 0 --lr {LR} --beta {BETA} --optimizer adamw --log-every 1"
    train = f"train-dpo --model policy --ref ref --data pairs.jsonl --out dpo --max-grad-norm {CLIP} {args}"
    assert command_line(train.split()) == 0
    logged = rows_of(folder / "dpo/metrics.jsonl")

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    pairs = [
        tuple(reference.encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        for row in rows_of(folder / "pairs.jsonl")
    ]
    policy, ref = reference.load(folder / "policy"), reference.load(folder / "ref")
    coefficient = getattr(policy.config, "router_aux_loss_coef", 0.0) if name == "mixtral" else 0.0
    also = reference.balance_loss(pairs, coefficient) if coefficient else None
    first, second = reference.dpo_updates(policy, ref, pairs, beta=BETA, lr=LR, steps=2, clip=CLIP, also=also)
    assert near(logged[0]["loss"], first.loss, 2e-4) and near(logged[0]["grad_norm"], first.norm, 1e-3)
    assert near(logged[1]["loss"], second.loss, 2e-3)

    check_saved(folder / "policy", folder / "dpo")


def check_saved(start: Path, saved: Path) -> None:
    """The same files, configuration, names and precision of weights as in the directory that was trained from."""
    files = {path.name for path in start.iterdir()}
    assert files <= {path.name for path in saved.iterdir()}
    assert len({(saved / file).stat().st_mode for file in files}) == 1
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (start, saved))
    assert before == after
    with safe_open(start / "model.safetensors", "pt") as old, safe_open(saved / "model.safetensors", "pt") as new:
        assert set(old.keys()) == set(new.keys())
        changed = 0
        for key in old.keys():  # noqa: SIM118
            a, b = old.get_tensor(key), new.get_tensor(key)
            assert a.dtype == b.dtype and a.shape == b.shape
            changed += not torch.equal(a, b)
        assert changed > 3


def test_weights_held_in_bfloat16_give_the_numbers_of_autocast(place):
    """What is held may only be read by products that autocast would round to the same numbers."""
    _, folder = place
    ids = torch.tensor([[7, 3, 9, 11, 30, 31, 12, 8, 40, 41, 5, 6]])
    models = [load_policy("policy", Place(frozen_in=dtype)).model for dtype in (torch.float32, torch.bfloat16)]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in models)
    low = sum(p.numel() for p in models[1].parameters() if p.dtype == torch.bfloat16)
    assert low > 0 and torch.equal(found, expected)


def test_greedy_samples_are_those_of_generate(place):
    name, folder = place
    draw = random.Random(5)
    rows = [{"prompt_id": f"p{i}", "prompt": f"Text {i}:{words(draw, 0, 3 * i)}"} for i in range(5)]
    rows += [{"prompt_id": "long", "prompt": f"Text:{words(draw, 40, 40)}"}]  # more than 64 tokens
    write(folder / "prompts.jsonl", rows)
    new = 12 if name == "recurrent-gemma" else 24
    sample = (
        f"sample --model policy --prompts prompts.jsonl --temperature 0 --max-new-tokens {new} --n 2 --out out.jsonl"
    )
    assert command_line(sample.split()) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    model = reference.load(folder / "policy", dtype=torch.float32)
    found = rows_of(folder / "out.jsonl")
    for i, row in enumerate(rows):
        expected = reference.greedy(model, tokenizer(row["prompt"])["input_ids"], new)
        for each in found[2 * i : 2 * i + 2]:
            assert [t for t in each["completion_ids"] if t != tokenizer.eos_token_id] == expected, row["prompt_id"]


def test_rewards_are_those_of_the_saved_classifier(place, capsys):
    name, folder = place
    train = "--max-steps 2 --batch-size 4 --warmup-steps 0 --lr 1e-3 --log-every 1 --validation 0.34"
    code = command_line(f"train-rm --model policy --data pairs.jsonl --out rm {train}".split())
    if not has_reward_model(zoo.ARCHITECTURES[name][0]):
        assert code == 2 and "policy" in capsys.readouterr().err and not (folder / "rm").exists()
        return
    assert code == 0
    pairs = rows_of(folder / "pairs.jsonl")
    texts = [
        {"prompt_id": f"{i}-{side}", "prompt": row["prompt"], "completion": row[side]}
        for i, row in enumerate(pairs)
        for side in ("chosen", "rejected")
    ]
    write(folder / "texts.jsonl", texts)
    assert command_line("score --data texts.jsonl --scorer rm --out scores.jsonl".split()) == 0
    found = [row["score"] for row in rows_of(folder / "scores.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "rm")
    ids = [reference.encode(tokenizer, text["prompt"], text["completion"])[0] for text in texts]
    expected = reference.rewards(folder / "rm", ids)
    spread = max(expected) - min(expected)
    assert spread > 0
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 5e-4 * max(1.0, spread)
