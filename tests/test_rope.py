"""Rotary frequencies that depend on the length: a log-prob is that of its text alone, whatever shares its batch."""

from types import SimpleNamespace

import pytest
import torch

from architectures import reference, zoo
from dpoctl.errors import InputError
from dpoctl.inference.generate import PromptTokens, Sampling, generate
from dpoctl.models import logprobs, probes, rope
from dpoctl.models.rewards import last_token_rewards
from dpoctl.training import setup

BOUNDARY = 24
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def make(kind: str):
    if kind == "dynamic":
        return zoo.make_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=BOUNDARY)
    return zoo.make_model("phi3-longrope")


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def texts() -> list[tuple[list[int], int]]:
    """On both sides of the boundary, and at it; two share a prompt across it."""
    prompt = ids_of(20)
    lengths = (BOUNDARY - 4, BOUNDARY, BOUNDARY + 1, 40, 31)
    shared = [(prompt + ids_of(n, n), len(prompt)) for n in (3, 12)]
    return [(ids_of(n, n), 5) for n in lengths] + shared


def alone(kind: str, sequences) -> torch.Tensor:
    """A fresh model for each text: nothing is left from another."""
    with torch.no_grad():
        return torch.stack([reference.summed_logp(make(kind).double(), text) for text in sequences])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("pack", [True, False])
def test_a_log_prob_does_not_depend_on_what_shares_its_batch(kind, pack):
    model, sequences = make(kind), texts()
    assert probes.can_pack(model, 9)
    model._dpoctl_can_pack = pack
    expected = alone(kind, sequences)
    for order in (range(len(sequences)), reversed(range(len(sequences)))):
        members = list(order)
        found = logprobs.summed_logps(model, [sequences[i] for i in members]).detach().double()
        assert torch.allclose(found, expected[members], atol=2e-4)
        for i in members:
            one = logprobs.summed_logps(model, [sequences[i]]).detach().double()
            assert torch.allclose(one, expected[i : i + 1], atol=2e-4)
    log_ratio, kl, _ = logprobs.policy_kl(model, make(kind), sequences, tokens_per_batch=1000)
    assert log_ratio.abs().max() < 1e-3 and kl.abs().max() < 1e-3


def test_the_frequencies_do_change_at_the_boundary():
    """Else these tests would show nothing."""
    long, short = ids_of(BOUNDARY + 1), ids_of(BOUNDARY + 1)[:-1]
    model = make("longrope")
    with torch.no_grad():
        a, b = (model(input_ids=torch.tensor([ids])).logits[0, BOUNDARY - 1] for ids in (long, short))
    assert (a - b).abs().max() > 1e-2


def test_rewards_do_not_depend_on_what_shares_their_batch():
    from transformers import Phi3ForSequenceClassification

    torch.manual_seed(0)
    config = make("longrope").config
    config.num_labels = 1
    model = Phi3ForSequenceClassification(config).eval()
    sequences = texts()
    together = last_token_rewards(model, sequences)
    single = torch.cat([last_token_rewards(model, [text]) for text in sequences])
    assert torch.allclose(together, single, atol=1e-4)


def test_samples_that_cross_the_boundary_are_those_of_generate(capsys):
    model, tokenizer = make("longrope"), zoo.make_tokenizer()
    prompts = [ids_of(n, n) for n in (10, BOUNDARY - 2, BOUNDARY, 30, 10)]
    asked = [PromptTokens(str(i), prompt, frozenset({0})) for i, prompt in enumerate(prompts)]
    found = generate(model, tokenizer, asked, [0, 1], Sampling(temperature=0, max_new_tokens=30))
    for prompt, row in zip(prompts, found, strict=True):
        expected = reference.greedy(model, prompt, 30)
        assert [[t for t in each.ids if t != 0] for each in row] == [expected] * 2
    assert "rotary frequencies change" in " ".join(capsys.readouterr().err.split())
    few = generate(model, tokenizer, asked[:1], [0], Sampling(temperature=0, max_new_tokens=12))
    assert few[0][0].ids == found[0][0].ids[:12] and not capsys.readouterr().err


def test_sharded_training_across_the_boundary_is_refused(monkeypatch):
    monkeypatch.setattr(setup.collectives, "world_size", lambda: 2)
    config = SimpleNamespace(parallel="fsdp", max_length=64, model="phi")
    with pytest.raises(InputError, match="other rotary frequencies from 25 tokens on"):
        setup.shard_model(config, make("longrope"), None)


def test_which_models_have_a_boundary():
    assert rope.switch_of(zoo.make_model("llama")) is None and rope.switch_of(zoo.make_model("gpt2")) is None
    assert rope.switch_of(zoo.make_model("gemma3")) is None
    assert rope.switch_of(make("longrope")) == rope.Switch(BOUNDARY, gradual=False)
    assert rope.switch_of(make("dynamic")) == rope.Switch(BOUNDARY, gradual=True)
