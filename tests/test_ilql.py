"""The heads of ILQL and decoding with them: losses, samples and KLs against full float64 computations, enumeration."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dpoctl.errors import InputError
from dpoctl.inference.generate import PromptTokens, Sampling, generate
from dpoctl.models import ilql, tiled_head
from dpoctl.models.logprobs import policy_kl, response_token_logps
from dpoctl.objectives.ilql import Weights, ilql_losses
from dpoctl.objectives.kl import kl
from helpers.ilql_values import perturbed
from helpers.tiny_models import tiny_model

VOCABULARY = 61
WEIGHTS = Weights(tau=0.7, gamma=0.9, cql=0.3, policy=0.5)
TEXTS = [([5, 6, 7, 8, 9], 2), ([5, 6, 11], 2), ([1, 2, 3, 4, 5, 6, 7], 3)]
RETURNS = [1.5, -0.5, 2.0]


# --- heads and losses ------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """Tiles of 16 columns: a vocabulary of 61 takes four."""
    monkeypatch.setattr(tiled_head, "_COLUMNS", {"cpu": 16})


def with_heads(kind: str = "gpt2") -> ilql.IlqlModel:
    """A small policy with heads whose targets differ from the Q heads."""
    policy = tiny_model(kind, vocab=VOCABULARY)
    model = ilql.IlqlModel(policy, ilql.make_heads(policy, seed=3))
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def reference_loss(model: ilql.IlqlModel, texts: list, returns: list[float]) -> Tensor:
    """The sum over tokens of the loss, text by text, from transformers' hidden states and full logits."""
    heads, total = model.heads, torch.zeros((), dtype=next(model.parameters()).dtype)
    for (ids, start), value in zip(texts, returns, strict=True):
        out = model.policy(torch.tensor([ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0]
        v = heads.v(states)[:, 0]
        q = [head.out(head.hidden(states).relu()) for head in heads.q]
        target = torch.minimum(*(head.out(head.hidden(states).relu()) for head in heads.target_q))
        for t in range(start, len(ids)):
            s, a = t - 1, ids[t]
            goal = value if t == len(ids) - 1 else WEIGHTS.gamma * v[s + 1].detach()
            u = target[s, a].detach() - v[s]
            total = total + sum((each[s, a] - goal) ** 2 for each in q)
            total = total + abs(WEIGHTS.tau - float(u < 0)) * u**2
            total = total - WEIGHTS.cql * sum(each[s].log_softmax(-1)[a] for each in q)
            total = total - WEIGHTS.policy * out.logits[0, s].log_softmax(-1)[a]
    return total


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_loss_and_gradient_are_those_of_full_logits(narrow, kind):
    """In float64, packed and tiled against plain transformers; the targets have no gradient."""
    model = with_heads(kind).double()
    losses = ilql_losses(model(TEXTS), torch.tensor(RETURNS, dtype=torch.float64), WEIGHTS)["total"]
    assert len(losses) == 3 + 1 + 4
    losses.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = reference_loss(model, TEXTS, RETURNS)
    expected.backward()
    # values are float32 where they enter the loss
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    for name, p in model.named_parameters():
        if "target_q" in name:
            assert found[name] is None and not p.requires_grad
        else:
            assert (found[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name


def test_what_shares_a_forward_pass_changes_nothing(narrow):
    model = with_heads()
    together = ilql_losses(model(TEXTS), torch.tensor(RETURNS), WEIGHTS)["total"]
    apart = [ilql_losses(model([t]), torch.tensor([r]), WEIGHTS)["total"] for t, r in zip(TEXTS, RETURNS, strict=True)]
    assert torch.allclose(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_targets_follow_by_a_moving_average():
    heads = with_heads().heads
    before = [p.clone() for p in heads.target_q.parameters()]
    heads.update_targets(0.25)
    for target, q, old in zip(heads.target_q.parameters(), heads.q.parameters(), before, strict=True):
        assert torch.allclose(target, 0.25 * q + 0.75 * old, atol=1e-6)
    fresh = ilql.make_heads(tiny_model("gpt2"), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(fresh.q.parameters(), fresh.target_q.parameters(), strict=True))


# --- decoding --------------------------------------------------------------------------------------------------------


def decoded(model: ilql.IlqlModel, folder, beta: float):
    """The policy, decoded with the values that are saved and read."""
    ilql.save_heads(model.heads, folder, torch.float32)
    ilql.decode_with_values(model.policy, folder, beta, "run")
    return model.policy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_is_that_of_the_perturbed_distribution(tmp_path, temperature):
    """Sampled and exact, token by token against float64; the reference is the original model."""
    model, reference = with_heads(), tiny_model("llama", vocab=VOCABULARY)
    policy = decoded(model, tmp_path, beta=1.5)
    found = policy_kl(policy, reference, TEXTS, tokens_per_batch=64, temperature=temperature)
    for n, (ids, start) in enumerate(TEXTS):
        p = perturbed(model, ids, 1.5, temperature)[start - 1 : -1]
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0].double()[start - 1 : -1]
        r = (logits / temperature).log_softmax(-1)
        at = torch.tensor(ids[start:])[:, None]
        assert found[0][n].item() == pytest.approx((p - r).gather(1, at).sum().item(), abs=1e-3)
        assert found[1][n].item() == pytest.approx(kl(p, r).sum().item(), rel=1e-4)
        assert found[2][n].item() == pytest.approx(logits.log_softmax(-1).gather(1, at).sum().item(), rel=1e-4)


def test_both_kls_are_the_sequence_kl_of_all_completions(tmp_path):
    """A vocabulary of 7 and completions of two tokens: the means over all 49, by their probability, are one number."""
    policy, reference = tiny_model("gpt2", vocab=7), tiny_model("llama", vocab=7)
    model = ilql.IlqlModel(policy, ilql.make_heads(policy, seed=3))
    with torch.no_grad():
        for head in model.heads.target_q:
            head.out.weight.mul_(8.0)
    decoded(model, tmp_path, beta=2.0)
    texts = [([3, 4, a, b], 2) for a, b in itertools.product(range(7), repeat=2)]
    logps = torch.stack([perturbed(model, ids, 2.0, 1.0)[[1, 2], ids[2:]].sum() for ids, _ in texts])
    with torch.no_grad():
        refs = [reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)[[1, 2], ids[2:]] for ids, _ in texts]
    expected = float(kl(logps, torch.stack([r.sum() for r in refs])))
    ratio, exact, _ = policy_kl(policy, reference, texts, tokens_per_batch=512)
    assert expected > 0.5 and logps.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    for found in (ratio, exact):
        assert float((logps.exp() * found.double()).sum()) == pytest.approx(expected, rel=1e-4)


def test_samples_are_those_of_the_perturbed_distribution(tmp_path):
    """Frequencies of 2000 first tokens; greedy takes the most likely."""
    model = with_heads()
    policy = decoded(model, tmp_path, beta=1.0)
    with torch.inference_mode():
        expected = perturbed(model, [5, 6], 1.0, 0.8)[-1].exp()
    tokenizer = SimpleNamespace(decode=lambda ids: "")
    prompt = PromptTokens("a", [5, 6], frozenset())
    found = generate(policy, tokenizer, [prompt], list(range(2000)), Sampling(temperature=0.8, max_new_tokens=1))  # type: ignore[arg-type]
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found[0]]), minlength=VOCABULARY).double() / 2000
    assert 0.5 * (counts - expected).abs().sum() < 0.06
    greedy = generate(policy, tokenizer, [prompt], [0], Sampling(temperature=0, max_new_tokens=1))  # type: ignore[arg-type]
    assert greedy[0][0].ids == [int(expected.argmax())]


def test_log_probs_of_the_own_head_are_refused(tmp_path):
    """A place that does not know of the values must not give another distribution's numbers without a word."""
    policy = decoded(with_heads(), tmp_path, beta=1.0)
    with pytest.raises(ValueError, match="decoded with other logits"):
        response_token_logps(policy, TEXTS)


def test_beta_swept_reaches_the_value_of_enumeration(tmp_path):
    """A network trained on all completions of a problem: its frontier is within 0.06 of that of the exact values."""
    tokens = range(5)
    completions = list(itertools.product(tokens, repeat=2))
    g = torch.Generator().manual_seed(0)
    returns = torch.randn(len(completions), generator=g)
    texts = [([5, a, b], 1) for a, b in completions]
    policy = tiny_model("gpt2", vocab=6)
    model = ilql.IlqlModel(policy, ilql.make_heads(policy, seed=0))
    weights = Weights(tau=0.5, gamma=1.0, cql=0.01, policy=1.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 250)
        optimizer.zero_grad()
        ilql_losses(model(texts), returns, weights)["total"].mean().backward()
        optimizer.step()
        model.heads.update_targets(0.1)
    # with uniform data and tau .5 the value of a first token is the mean over the second
    last = returns.view(5, 5).double()
    first = last.mean(1)
    found, exact = [], []
    decoded(model, tmp_path, 0.0)
    for beta in (0.0, 0.5, 1.0, 2.0, 4.0, 16.0):
        p = [perturbed(model, ids, beta, 1.0)[[0, 1], ids[1:]].sum().exp() for ids, _ in texts]
        found.append(float((torch.stack(p) * returns).sum()))
        best = (beta * first).softmax(0)[:, None] * (beta * last).softmax(1)
        exact.append(float((best * last).sum()))
    assert found == pytest.approx(exact, abs=0.06)
    assert found == sorted(found) and found[-1] > found[0] + 1.0


def test_a_head_that_is_not_plain_is_refused():
    with pytest.raises(InputError, match="scaled or capped"):
        ilql.require_plain_head(tiny_model("gemma2"), "gemma")
