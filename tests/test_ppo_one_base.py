"""PPO with adapters: policy, value, reference and reward model on one frozen base, with the numbers of copies."""

import pytest
import torch

from dpoctl.cli.app import run as command_line
from dpoctl.models.load import load_classifier, load_policy
from dpoctl.models.place import Place
from dpoctl.models.shared_weights import frozen_copy, share_frozen
from dpoctl.training.ppo import PPO
from helpers.tiny_models import tiny_model

peft = pytest.importorskip("peft")

SHORT = "--max-length 96 --max-prompt-length 16 --warmup-steps 0 --lora 4".split()
STEPS = (
    "--lr 3e-3 --batch-size 8 --minibatch-size 4 --ppo-epochs 2 --max-steps 2 --max-new-tokens 6 --vf-coef 1".split()
)
POINTS = "--eval-prompts test.jsonl --eval-limit 4 --scorer classifier --eval-every 2".split()


@pytest.fixture
def reward(here):
    """`rm-adapter`, a reward model's adapters on sft, and `rm-whole`, that model merged into one directory."""
    if not (here.folder / "rm-whole").exists():
        args = ["train-rm", "--model", "sft", "--data", "prefs.jsonl", *SHORT, "--lr", "3e-3", "--batch-size", "16"]
        assert command_line([*args, "--max-steps", "6", "--out", "rm-adapter"]) == 0
        assert command_line(["merge", "rm-adapter", "--out", "rm-whole"]) == 0
    return here


@pytest.fixture
def tasks(monkeypatch):
    """The PPO tasks that the test runs, in order."""
    made, start = [], PPO.__init__

    def noted(self, *args):
        start(self, *args)
        made.append(self)

    monkeypatch.setattr(PPO, "__init__", noted)
    return made


def bytes_of(*models) -> int:
    """Bytes of the weights of models, each storage counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("kind", [[], ["--use-dora"]], ids=["lora", "dora"])
@pytest.mark.parametrize("start", ["sft", pytest.param("adapter", marks=pytest.mark.slow)])
def test_one_base_computes_what_separate_copies_compute(reward, tasks, kind, start):
    model = "sft" if start == "sft" else f"start{''.join(kind)}"
    if start == "adapter":
        sft = ["sft", "--model", "sft", "--data", "sft.jsonl", *SHORT, "--lr", "1e-3", "--max-steps", "2"]
        assert command_line([*sft, *kind, "--out", model]) == 0
    rows = {}
    for rm in ("rm-adapter", "rm-whole"):
        out = f"ppo-{start}-{rm}{''.join(kind)}"
        args = [
            "train-ppo",
            "--model",
            model,
            "--prompts",
            "train.jsonl",
            "--reward",
            rm,
            *SHORT,
            *STEPS,
            *POINTS,
            *kind,
        ]
        assert command_line([*args, "--out", out]) == 0
        rows[rm] = reward.rows(f"{out}/metrics.jsonl")
    # the value's DoRA takes its norms from the base, not from the merged weights: after an update the policies differ
    # enough to sample other tokens
    near, steps = (2e-2, 1) if kind else (2e-3, None)
    for one, apart in zip(rows["rm-adapter"][:steps], rows["rm-whole"][:steps], strict=True):
        assert one.keys() == apart.keys()
        for name in one:
            few = 0.02 if name.endswith("clipfrac_avg") else 2e-4  # two of 96 tokens
            assert one[name] == pytest.approx(apart[name], rel=near, abs=few), name
    assert rows["rm-adapter"][0]["loss/value_avg"] > 1e-4  # there is something to compare

    one, apart = tasks
    base = bytes_of(load_policy("sft").model)
    models = [[t.policy, t.model, t.reference, t.reward.model] for t in (one, apart)]
    trained, embedding = bytes_of(one.adapters) - base, one.reward.model.get_input_embeddings().weight.nbytes
    assert bytes_of(*models[0]) < base + embedding + 5 * trained  # embeddings with a row for padding
    assert bytes_of(*models[1]) > 2 * base
    assert all(p.requires_grad is False for p in one.reward.model.parameters())


def test_a_value_model_that_shares_a_base_is_on_the_policys_device():
    """Its embedding is the policy's and on the device already, its adapters and buffers are where it was loaded."""
    from dpoctl.models import lora
    from dpoctl.models.rewards import make_critic

    policy, start = tiny_model("llama"), tiny_model("llama")
    start.score = torch.nn.Linear(start.config.hidden_size, 1, bias=False)
    for model in (policy, start):
        lora.adapt(model, lora.LoraSettings(rank=4), "base", None)
    policy.to("meta")
    start.model.embed_tokens = policy.model.embed_tokens
    trunk = make_critic(policy, "separate", start).trunk
    assert {t.device.type for t in (*trunk.parameters(), *trunk.buffers())} == {"meta"}
    assert trunk.embed_tokens.weight is policy.model.embed_tokens.weight


def test_one_base_in_bfloat16(reward, tasks):
    """The frozen weights that all hold are those that are cast to the compute dtype."""
    args = ["train-ppo", "--model", "sft", "--prompts", "train.jsonl", "--reward", "rm-adapter", *SHORT, *STEPS]
    assert command_line([*args, "--dtype", "bfloat16", "--activation-checkpointing", "--out", "ppo-low"]) == 0
    [task] = tasks
    base = bytes_of(task.policy)
    embedding = task.reward.model.get_input_embeddings().weight.nbytes
    every = bytes_of(task.policy, task.model, task.reference, task.reward.model)
    assert every < base + embedding + 3 * sum(p.nbytes for p in task.policy.parameters() if p.requires_grad)
    layer = task.policy.transformer.h[0].mlp.c_fc.base_layer
    assert layer.weight.dtype == torch.bfloat16
    assert task.reward.model.transformer.h[0].mlp.c_fc.base_layer.weight is layer.weight
    assert task.model.trunk.h[0].mlp.c_fc.base_layer.weight is layer.weight
    rows = reward.rows("ppo-low/metrics.jsonl")
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-2)


def test_what_is_shared_is_what_is_equal(reward):
    """Weights of another model, or of another precision's rounding, stay where they are."""
    policy = load_policy("sft").model.requires_grad_(False)
    same, other = (
        load_classifier("rm-adapter", Place(apart=True)).model,
        load_classifier("rm-whole").model.requires_grad_(False),
    )
    before = last_rewards(same), last_rewards(other)
    shared = share_frozen(same, [policy])
    assert shared > 0.9 * (bytes_of(policy.transformer) - policy.transformer.wte.weight.nbytes)
    share_frozen(other, [policy])
    layer = other.transformer.h[0]
    assert layer.attn.c_attn.weight is not policy.transformer.h[0].attn.c_attn.weight  # merged: other numbers
    assert layer.ln_1.weight is policy.transformer.h[0].ln_1.weight
    assert torch.equal(last_rewards(same), before[0]) and torch.equal(last_rewards(other), before[1])
    policy.transformer.h[0].ln_1.weight.data.mul_(2)
    assert not torch.equal(last_rewards(same), before[0])


@torch.no_grad()
def last_rewards(model) -> torch.Tensor:
    return model(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])).logits[:, 0]


def test_a_frozen_copy_stays_where_the_policy_moves(reward):
    from dpoctl.models import lora

    policy = load_policy("sft").model
    lora.adapt(policy, lora.LoraSettings(rank=4), "sft", "CAUSAL_LM")
    start, ids = frozen_copy(policy), torch.arange(5, 15)[None]
    with torch.no_grad():
        before = policy(ids).logits
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
        assert torch.equal(start(ids).logits, before) and not torch.equal(policy(ids).logits, before)
    assert not any(p.requires_grad for p in start.parameters())
    assert bytes_of(policy, start) < 1.5 * bytes_of(policy)


@pytest.mark.slow
def test_the_plan_counts_one_base_once(reward, capsys):
    """Beside adapters the reward model takes a small part of what the same model apart takes."""
    sizes = []
    for rm in ("rm-adapter", "rm-whole"):
        args = ["train-ppo", "--model", "sft", "--prompts", "train.jsonl", "--reward", rm, *SHORT, *STEPS]
        capsys.readouterr()
        assert command_line([*args, "--dry-run", "--plan-device", "h100", "--out", "planned"]) == 0
        [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("memory: reward")]
        number, unit = line.split()[-2:]
        sizes.append(float(number) * {"GB": 1e9, "MB": 1e6}[unit])
    assert sizes[0] < 0.2 * sizes[1]
