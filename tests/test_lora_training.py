"""Adapters from train-dpo to sample: only they are trained and saved, and the frozen model is the reference."""

import json

import pytest
import torch

from dpoctl.cli.app import run as command_line
from dpoctl.data.encode import Limits, encode_pairs
from dpoctl.data.readers import load_rows
from dpoctl.models import lora
from dpoctl.models.load import load_classifier, load_policy
from dpoctl.models.logprobs import summed_logps
from dpoctl.models.rewards import make_critic, rewards_of
from dpoctl.training import pairs

peft = pytest.importorskip("peft")

SHORT = "--max-length 96 --max-prompt-length 16 --warmup-steps 0 --batch-size 16 --lr 3e-3 --lora 4 --epochs 9".split()
SEQUENCES = [([5, 6, 7, 8, 9, 10], 2), ([5, 6, 20, 21], 2), ([30, 31, 32, 33, 34], 3)]


def settings():
    return lora.LoraSettings(rank=4)


def test_from_train_dpo_to_sample(here):
    args = [
        *"train-dpo --model sft --data prefs.jsonl".split(),
        *SHORT,
        *"--lr 5e-4 --max-steps 12 --log-every 1 --save-every 4 --out dpo-lora".split(),
    ]
    assert command_line(args) == 0
    rows = here.rows("dpo-lora/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and min(row["loss"] for row in rows) < 0.65
    files = {p.name for p in (here.folder / "dpo-lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not {"model.safetensors", "README.md", "config.json"} & files
    base = json.loads((here.folder / "dpo-lora/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(here.folder / "sft")
    [*_, newest] = sorted((here.folder / "dpo-lora/checkpoints").glob("step-*"))
    adapters = (here.folder / "dpo-lora/adapter_model.safetensors").stat().st_size
    assert (newest / "model.safetensors").stat().st_size < 1.2 * adapters  # no frozen weight is in it

    ours = load_policy("dpo-lora").model
    base = load_policy("sft").model
    theirs = peft.PeftModel.from_pretrained(load_policy("sft").model, "dpo-lora").eval().get_base_model()
    with torch.no_grad():
        mine, known, start = (summed_logps(m, SEQUENCES) for m in (ours, theirs, base))
    assert torch.allclose(mine, known, atol=1e-4) and not torch.allclose(mine, start, atol=1e-2)
    sample = ["sample", "--model", "dpo-lora", "--prompts", "test.jsonl", "--max-new-tokens", "4"]
    assert command_line([*sample, "--out", "of-lora.jsonl"]) == 0
    assert len(here.rows("of-lora.jsonl")) == 12


def test_a_reward_model_and_ppo(here):
    rm = ["train-rm", "--model", "sft", "--data", "prefs.jsonl", *SHORT, "--max-steps", "8", "--out", "rm-lora"]
    assert command_line(rm) == 0
    assert (here.folder / "rm-lora/adapter_model.safetensors").stat().st_size < 200_000  # no embeddings
    model, _, codec = load_classifier("rm-lora")
    data = encode_pairs(load_rows("prefs.jsonl", "preferences"), codec, Limits(96, 16))
    rewards = rewards_of(model, pairs.sequences(data), tokens_per_batch=4096)
    # the shift was measured on the model that was trained: the one that is loaded is the same
    assert rewards.mean().item() == pytest.approx(model.config.reward_shift, abs=1e-4) and rewards.std() > 0.01

    # and so is the one model that it is merged into
    assert command_line(["merge", "rm-lora", "--out", "rm-merged"]) == 0
    merged = load_classifier("rm-merged").model
    assert torch.allclose(rewards_of(merged, pairs.sequences(data), tokens_per_batch=4096), rewards, atol=1e-5)
    assert merged.config.reward_shift == model.config.reward_shift and not hasattr(merged, "peft_config")

    ppo = [
        *"train-ppo --model sft --prompts train.jsonl --reward rm-lora".split(),
        *SHORT,
        *"--batch-size 8 --minibatch-size 4 --ppo-epochs 1 --max-steps 2 --max-new-tokens 6 --out ppo-lora".split(),
    ]
    assert command_line(ppo) == 0
    kl = [row["objective/kl"] for row in here.rows("ppo-lora/metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-4) and abs(kl[1]) > 1e-4
    assert (here.folder / "ppo-lora/adapter_model.safetensors").exists()


def test_the_value_function_shares_the_frozen_weights(here):
    policy = load_policy("sft").model
    lora.adapt(policy, settings(), "sft", "CAUSAL_LM")
    critic = make_critic(policy, "separate")
    trained = {n for n, p in critic.trunk.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)
    shared = {id(p) for p in policy.parameters()}
    assert all((id(p) in shared) != p.requires_grad for p in critic.trunk.parameters())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--lora-alpha", "8"], "--lora-alpha has no effect without --lora"),
        (["--lora", "4", "--lora-targets", "nothing"], "--lora-targets nothing"),
        (["--lora", "4", "--lora-targets", "lm_head"], "cannot be adapted"),
    ],
)
def test_what_cannot_be_adapted_is_refused(here, capsys, flags, word):
    args = ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", "--out", "refused", *flags]
    assert command_line(args) == 2
    assert word in " ".join(capsys.readouterr().err.split())
