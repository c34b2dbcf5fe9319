"""A completion in several pairs is forwarded once; losses and gradients equal one forward for each pair."""

import contextlib
import itertools

import pytest
import torch

from dpoctl.data.encode import PairData
from dpoctl.models import logprobs, tiled_head
from dpoctl.objectives.pair_logps import PairLogps
from dpoctl.objectives.preference import sigmoid
from dpoctl.training import pairs
from dpoctl.training.forward import Forward
from helpers.tiny_models import tiny_model


def tiny(name: str):
    return tiny_model(name, context=48, width=24, heads=2, std=0.3)


def some_pairs() -> PairData:
    """3 prompts, 4 completions each of different lengths, all 6 pairs of each."""
    generator = torch.Generator().manual_seed(1)
    data = PairData()
    for p in range(3):
        data.prompts.append(torch.randint(0, 61, (2 + p,), generator=generator).tolist())
        first = len(data.completions)
        for k in range(4):
            data.completions.append(torch.randint(0, 61, (1 + 3 * k + p,), generator=generator).tolist())
            data.prompt_of.append(p)
        data.pairs.extend(
            itertools.permutations(range(first, first + 4), 2)
            if p == 2
            else itertools.combinations(range(first, first + 4), 2)
        )
    data.lines = list(range(len(data.pairs)))
    return data


def naive_logp(model, ids: list[int], start: int) -> torch.Tensor:
    logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(start, len(ids)))


def naive_step(model, data: PairData, chosen_pairs: list[int], ref: torch.Tensor, double: bool):
    """Loss and gradients by forwarding chosen and rejected of every pair one by one with full logits."""
    model.zero_grad()
    seqs = pairs.sequences(data)
    total = 0.0
    for pair in chosen_pairs:
        w, l = data.pairs[pair]  # noqa: E741
        sides = []
        for i in (w, l):
            ids, start = seqs[i]
            logits = model(torch.tensor([ids])).logits[0]
            logps = (logits if double else logits.float()).log_softmax(-1)
            sides.append(sum(logps[t - 1, ids[t]] for t in range(start, len(ids))))
        d = (sides[0] - ref[w]) - (sides[1] - ref[l])
        loss = -torch.nn.functional.logsigmoid(0.1 * d) / len(chosen_pairs)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}


def shared_step(model, data: PairData, chosen_pairs: list[int], ref: torch.Tensor, tokens: int):
    model.zero_grad()
    seqs = pairs.sequences(data)
    total, forwarded = 0.0, 0
    for batch in pairs.micro_batches(data, chosen_pairs, tokens):
        sides = Forward().sides(model, seqs, batch)
        forwarded += len(batch.completions)
        other = ref[batch.completions].to(sides.chosen.dtype)
        w, l = batch.pairs.unbind(1)  # noqa: E741
        ones = torch.ones(len(w))
        logps = PairLogps(sides.chosen, sides.rejected, other[w], other[l], ones, ones)
        loss = sigmoid(logps, 0.1).sum() / batch.n_global
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}, forwarded


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_shared_batch_equals_naive(name, tokens):
    """Loss and gradients are off from float64 by at most twice the error of the naive float32 computation."""
    data, model = some_pairs(), tiny(name)
    ref = torch.randn(len(data.completions), generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 20
    chosen = list(range(len(data.pairs)))[:-3]  # the last prompt is split at the batch's edge
    loss, grads, forwarded = shared_step(model, data, chosen, ref, tokens)
    assert forwarded == len({i for p in chosen for i in data.pairs[p]}) < 2 * len(chosen)
    naive, naive_grads = naive_step(model, data, chosen, ref, double=False)
    exact, exact_grads = naive_step(tiny(name).double(), data, chosen, ref, double=True)
    rounding = 2e-7 * abs(exact)  # below one float32 rounding of the loss there is nothing to compare
    assert abs(loss - exact) <= 2 * abs(naive - exact) + rounding
    for key, gradient in exact_grads.items():
        ours = (grads[key].double() - gradient).norm()
        theirs = (naive_grads[key].double() - gradient).norm()
        assert ours <= 2 * theirs + 1e-6 * gradient.norm(), key


def test_tiles_and_recomputation_change_nothing(monkeypatch):
    data = some_pairs()
    ref = torch.zeros(len(data.completions))
    every = list(range(len(data.pairs)))
    whole, grads, _ = shared_step(tiny("gpt2"), data, every, ref, 10_000)
    monkeypatch.setattr(tiled_head, "_KEPT_BYTES", 0)
    monkeypatch.setattr(tiled_head, "_COLUMNS", {"cpu": 16})
    tiled, tiled_grads, _ = shared_step(tiny("gpt2"), data, every, ref, 10_000)
    assert tiled == pytest.approx(whole, rel=1e-6)  # float32 rounding in another order of sums
    for key in grads:
        assert torch.allclose(grads[key], tiled_grads[key], rtol=1e-4, atol=1e-6), key


def test_padding_and_order_change_nothing():
    model, seqs = tiny("gpt2"), pairs.sequences(some_pairs())
    alone = torch.stack([naive_logp(model, ids, start) for ids, start in seqs]).detach()
    for tokens in (1, 40, 10_000):
        together = logprobs.response_logps(model, seqs, tokens_per_batch=tokens)
        assert torch.allclose(together, alone, rtol=0, atol=2e-4)  # sums of up to 14 float32 log-probs of size 10
        backwards = logprobs.response_logps(model, seqs[::-1], tokens_per_batch=tokens)
        assert torch.allclose(backwards.flip(0), alone, rtol=0, atol=2e-4)


def test_policy_kl_is_zero_for_the_same_model_and_exact_for_another():
    policy, other, seqs = tiny("gpt2"), tiny("llama"), pairs.sequences(some_pairs())
    ratio, exact, _ = logprobs.policy_kl(policy, policy, seqs, tokens_per_batch=50)
    assert ratio.abs().max() == 0 and exact.abs().max() == 0
    ratio, exact, ref = logprobs.policy_kl(policy, other, seqs, tokens_per_batch=50, temperature=0.7)
    ids, start = seqs[5]
    p = (policy(torch.tensor([ids])).logits[0].double() / 0.7).log_softmax(-1)[start - 1 : -1]
    r = (other(torch.tensor([ids])).logits[0].double() / 0.7).log_softmax(-1)[start - 1 : -1]
    chosen = torch.tensor(ids[start:])[:, None]
    assert exact[5].item() == pytest.approx((p.exp() * (p - r)).sum().item(), rel=1e-5)
    assert ratio[5].item() == pytest.approx((p - r).gather(1, chosen).sum().item(), rel=1e-4, abs=1e-4)
    assert ref[5].item() == pytest.approx(naive_logp(other, ids, start).item(), rel=1e-5)


def test_the_reference_is_entered_once_a_micro_batch(monkeypatch):
    """Adapters are switched in every layer: for each tile of logits that would take longer than the tile."""
    monkeypatch.setattr(logprobs, "_TILE_BYTES", 1)  # tiles of 16 rows
    entered, policy, seqs = [], tiny("gpt2"), pairs.sequences(some_pairs())

    @contextlib.contextmanager
    def as_reference():
        entered.append(1)
        yield

    logprobs.policy_kl(policy, policy, seqs, tokens_per_batch=10_000, as_reference=as_reference)
    assert len(entered) == 1
