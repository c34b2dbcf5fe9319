"""One packed row with shared prompts gives what padded separate sequences give, for every decoder architecture."""

import pytest
import torch

from dpoctl.models import logprobs, packed, probes, tiled_head
from helpers.log_probs import one_by_one
from helpers.tiny_models import tiny_model

PACKED = ["gpt2", "neox", "llama", "qwen2", "qwen3", "mistral"]
PADDED = ["bloom", "gemma2"]


def build(name: str, double: bool = False):
    model = tiny_model(name)
    return model.double() if double else model


def some_sequences() -> list[tuple[list[int], int]]:
    """Three prompts of 2, 9 and 1 tokens with 3, 2 and 1 completions, one of a single token, in mixed order."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 61, (n,), generator=draw).tolist() for n in (2, 9, 1)]
    lengths = [(0, 5), (1, 7), (0, 1), (2, 4), (1, 3), (0, 11)]
    return [(prompts[p] + torch.randint(0, 61, (n,), generator=draw).tolist(), len(prompts[p])) for p, n in lengths]


def weighted(model, sequences, summed) -> tuple[torch.Tensor, dict]:
    """Summed log-probs, and the gradients of their weighted sum."""
    logps = summed(model, sequences)
    (logps * torch.linspace(-1, 2, len(sequences), dtype=logps.dtype)).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def padded(model, sequences) -> torch.Tensor:
    """One padded batch with the model's own attention and logits."""
    ids, at, _ = packed.pad(sequences, 0)
    logps = model(ids).logits.flatten(0, 1)[at].float().log_softmax(-1)
    owner = torch.repeat_interleave(torch.tensor([len(s) - start for s, start in sequences]))
    targets = torch.tensor([t for s, start in sequences for t in s[start:]])
    return torch.zeros(len(sequences)).index_add(0, owner, logps.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("name", PACKED)
def test_packed_batches_are_as_close_to_float64_as_padded_ones(name):
    """Log-probs and every gradient: error against float64 at most twice the padded way's, and one float32 rounding."""
    sequences = some_sequences()
    exact, exact_grads = weighted(build(name, double=True), sequences, one_by_one)
    model = build(name)
    assert probes.can_pack(model, 64)
    ours, grads = weighted(model, sequences, logprobs.summed_logps)
    theirs, padded_grads = weighted(build(name), sequences, padded)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 2e-7 * exact.abs().max()
    assert grads.keys() == exact_grads.keys()
    for key, gradient in exact_grads.items():
        error, padded_error = ((g[key].double() - gradient).norm() for g in (grads, padded_grads))
        assert error <= 2 * padded_error + 1e-6 * gradient.norm(), key


@pytest.mark.parametrize("name", PADDED)
def test_an_architecture_that_cannot_be_packed_is_padded_with_a_warning(name, capsys):
    model, sequences = build(name), some_sequences()
    ours, _ = weighted(model, sequences, logprobs.summed_logps)
    assert logprobs.lay_out([model], sequences).parts[0].tree is None
    assert "batches are padded" in capsys.readouterr().err
    exact = one_by_one(build(name, double=True), sequences)
    assert torch.allclose(ours.double(), exact, rtol=2e-5, atol=1e-5)


def test_prompts_are_shared_where_that_saves_tokens():
    sequences = some_sequences()
    layout = logprobs.lay_out([build("gpt2")], sequences)
    prompts, responses = 2 + 9 + 1, sum(len(s) - start for s, start in sequences)
    assert layout.parts[0].ids.shape == (1, prompts + responses - len(sequences))  # the last tokens predict nothing
    texts = [([7] + [i] * 30, 1) for i in range(40)]  # one token in common: 40 branches would see each other's masks
    assert len(packed.group_by_prompt(texts, 32)) == 40
    assert len(packed.group_by_prompt([([7] * 200 + [i] * 9, 200) for i in range(8)], 32)) == 1


def test_flex_attention_equals_masked_attention():
    """What a GPU runs: FlexAttention with the tree's block mask against the masks of a CPU, window included."""
    from torch.nn.attention.flex_attention import flex_attention

    _, tree, _, _ = packed.pack(some_sequences(), 1 << 20, torch.device("cpu"), whole=True)
    n = len(tree.group)
    q, k, v = torch.randn(3, 1, 4, n, 8, generator=torch.Generator().manual_seed(0))
    for window in (None, 4):
        masked, _ = packed.attend(None, q, k, v, None, tree=tree, scaling=0.5, sliding_window=window)
        flex = flex_attention(q, k, v, block_mask=tree.block_mask(window), scale=0.5).transpose(1, 2)
        assert torch.allclose(masked, flex, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [1 << 30, 0])
def test_the_tiled_head_equals_full_logits(monkeypatch, bias, kept):
    """Against float64 over whole logits, where the softmax tiles are kept and where they are computed again."""
    monkeypatch.setattr(tiled_head, "_COLUMNS", {"cpu": 16})
    monkeypatch.setattr(tiled_head, "_KEPT_BYTES", kept)
    draw = torch.Generator().manual_seed(0)
    rows, weight = 3 * torch.randn(9, 12, generator=draw), torch.randn(61, 12, generator=draw)
    offset = torch.randn(61, generator=draw) if bias else None
    targets = torch.tensor([0, 60, 15, 16, 31, 32, 48, 7, 60])
    inputs = [t.requires_grad_() for t in (rows, weight, offset) if t is not None]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    weights = torch.linspace(-1, 3, 9)

    logps = tiled_head.token_logps(rows, weight, offset, targets)
    (logps * weights).sum().backward()
    logits = doubles[0] @ doubles[1].t() + (doubles[2] if bias else 0.0)
    exact = logits.log_softmax(-1)
    (exact.gather(1, targets[:, None])[:, 0] * weights).sum().backward()

    assert torch.allclose(logps.double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    for single, double in zip(inputs, doubles, strict=True):
        assert (single.grad - double.grad).norm() <= 1e-6 * double.grad.norm()
    again, entropies = tiled_head.logps_and_entropies(rows, weight, offset, targets)
    assert torch.allclose(again, logps, rtol=1e-6, atol=1e-6)
    # a difference of numbers of the logits' size, here up to 60, each with float32's 6e-8 of it
    assert torch.allclose(entropies.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=2e-5)


def test_the_tiled_head_with_logits_of_hundreds():
    """Neither overflow nor underflow where one tile's softmax vanishes beside another's."""
    rows = torch.tensor([[1.0], [-1.0]]).requires_grad_()
    weight = torch.linspace(-400, 400, 3000)[:, None].requires_grad_()
    logps = tiled_head.token_logps(rows, weight, None, torch.tensor([2999, 2999]))
    exact = (rows @ weight.t()).double().log_softmax(-1)[:, 2999]
    assert torch.allclose(logps.double(), exact, rtol=1e-6)
    logps.sum().backward()
    assert weight.grad.isfinite().all() and rows.grad.isfinite().all()


def test_bfloat16_stays_near_float32():
    """Products with 8 bits: a log-prob a token within 0.02 nats, gradients within 2 % in norm; log-probs float32."""
    sequences = some_sequences()
    model = build("gpt2")
    exact, exact_grads = weighted(model, sequences, logprobs.summed_logps)
    exact_grads = {n: g.clone() for n, g in exact_grads.items()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = logprobs.summed_logps(model, sequences)
    assert logps.dtype == torch.float32
    (logps * torch.linspace(-1, 2, len(sequences))).sum().backward()
    tokens = torch.tensor([len(ids) - start for ids, start in sequences])
    assert ((logps - exact).abs() / tokens).max() < 0.02
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g.dtype == torch.float32 for g in grads.values())
    off = sum((grads[n] - g).norm() ** 2 for n, g in exact_grads.items()) ** 0.5
    assert off < 0.02 * sum(g.norm() ** 2 for g in exact_grads.values()) ** 0.5


def test_logits_that_keep_the_float32_sums_of_products_are_one_rounding_less(monkeypatch):
    """What a GPU does, with its product replaced by the float32 product of the rounded numbers: the same sums."""
    draw = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 64, generator=draw).bfloat16() for n in (200, 3000))
    rows = rows * 0.7  # logits of up to 25
    bias, targets = torch.randn(3000, generator=draw), torch.randint(0, 3000, (200,), generator=draw)
    exact = (rows.double() @ weight.double().t() + bias.double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    rounded = tiled_head.token_logps(rows, weight, bias, targets)
    product = torch.mm

    def wide(a, b, out_dtype=None, **options):
        return product(a.float(), b.float()) if out_dtype else product(a, b, **options)

    monkeypatch.setattr(tiled_head, "keeps_float32_sums", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", wide)
    kept = tiled_head.token_logps(rows, weight, bias, targets)
    errors = [(found.double() - exact).square().mean().sqrt() for found in (rounded, kept)]
    assert kept.dtype == torch.float32 and errors[1] < 1e-4 < errors[0]
    output = torch.nn.Linear(64, 3000, dtype=torch.bfloat16)
    assert tiled_head.logits(output, rows).dtype == torch.float32
    assert tiled_head.logits(output.float(), rows.float()).dtype == torch.float32


def test_a_cpu_has_no_such_product_and_computes_as_before():
    assert not tiled_head.keeps_float32_sums(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(NotImplementedError):
        torch.mm(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16(), out_dtype=torch.float32)
