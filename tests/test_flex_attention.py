"""What a GPU runs in place of attention by masks, run on a CPU: FlexAttention, compiled, over rows of whole blocks.

Only the last step differs from a GPU's: torch's own graph of the attention runs as it is, without a Triton kernel.
"""

import random
from functools import partial

import pytest
import torch
import transformers as hf
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from dpoctl.models import attention_kernel, logprobs, packed, probes
from helpers.log_probs import one_by_one

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,  # a row of 256 tokens is longer: its filler must not be at position 160
    "initializer_range": 0.2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 16}


def gpt2():
    shape = {"vocab_size": 97, "n_positions": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**shape))


def two_windows():
    """Layers with a window of 16 tokens and layers without one, which take turns."""
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, **layers))


MODELS = {
    "gpt2": gpt2,
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=20)),
    "gemma3": two_windows,
}


def build(name: str):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def some_sequences(groups: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Prompts of 1 to 60 tokens with 1 to 4 completions of 1 to 70."""
    draw = random.Random(seed)
    found = []
    for _ in range(groups):
        prompt = [draw.randrange(2, 97) for _ in range(draw.randint(1, 60))]
        for _ in range(draw.randint(1, 4)):
            answer = [draw.randrange(2, 97) for _ in range(draw.randint(1, 70))]
            found.append((prompt + answer, len(prompt)))
    return found


def weighted(model, sequences, summed) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed log-probs, and the gradients of their weighted sum in float64."""
    model.zero_grad()
    logps = summed(model, sequences)
    (logps * torch.linspace(-1, 2, len(sequences), dtype=logps.dtype)).sum().backward()
    return logps.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def blocks(monkeypatch):
    """Take a GPU's way on the CPU; gives the counter of the graphs that were compiled."""
    import torch.nn.attention.flex_attention as flex

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = packed.compiled_flex.__wrapped__(counter)
    monkeypatch.setattr(packed, "compiled_flex", lambda: compiled)
    monkeypatch.setattr(packed, "uses_flex", lambda device: True)
    # torch has no kernel for the backward pass on a CPU and refuses it; the graph that runs here has one
    monkeypatch.setattr(flex, "_validate_device", lambda *states: None)
    attention_kernel.fault_of.cache_clear()
    yield counter
    attention_kernel.fault_of.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_masks_and_of_float64(name, blocks, monkeypatch):
    """Errors against float64, one text at a time: at most twice those of attention by masks, and one rounding."""
    sequences = some_sequences(2)
    exact, exact_grads = weighted(build(name).double(), sequences, one_by_one)
    model = build(name)
    ours, grads = weighted(model, sequences, logprobs.summed_logps)
    (part,) = logprobs.lay_out([model], sequences).parts
    assert part.tree is not None and part.ids.shape[1] % 128 == 0 and part.tree.filler > 0
    assert blocks.frame_count > 0
    monkeypatch.setattr(packed, "uses_flex", lambda device: False)
    theirs, masked_grads = weighted(build(name), sequences, logprobs.summed_logps)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 2e-7 * exact.abs().max()
    assert grads.keys() == exact_grads.keys()
    for key, gradient in exact_grads.items():
        error, masked_error = ((g[key] - gradient).norm() for g in (grads, masked_grads))
        assert error <= 2 * masked_error + 2e-6 * gradient.norm(), key


def test_a_row_of_few_tokens_has_two_blocks_and_no_position_of_its_own(blocks):
    _, tree, _, _ = packed.pack([([1, 2, 3], 1)], 64, CPU, whole=True)
    assert len(tree.group) == 256 and tree.longest == 3 and tree.position[3:].eq(0).all()
    assert {x.dtype for x in (tree.group, tree.branch, tree.position)} == {torch.int32}
    at = torch.arange(256)
    seen = tree.visible(at[:, None], at[None], None)
    assert not seen[:3, 3:].any() and not seen[3:, :3].any() and seen.diagonal().all()


def test_queries_and_keys_of_another_precision_are_attended_in_that_of_the_values(blocks):
    """As rotary positions leave them under autocast; earlier versions of torch raise for them."""
    sequences = some_sequences(3)
    _, tree, _, _ = packed.pack(sequences, 64, CPU, whole=True)
    q, k, v = torch.randn(3, 1, 4, len(tree.group), 16, generator=torch.Generator().manual_seed(0))
    mixed, _ = packed.attend(None, q, k, v.bfloat16(), None, tree=tree, scaling=0.25)
    rounded, _ = packed.attend(None, q.bfloat16(), k.bfloat16(), v.bfloat16(), None, tree=tree, scaling=0.25)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, rounded)


@pytest.mark.slow
def test_thirty_shapes_and_two_windows_are_few_variants(blocks):
    """Each of: with gradients or without, with a window or without; none for the length, or for a row of one block.

    torch's limit of 8 would be reached by the reference, the policy and a scorer. Tensors are shapes without numbers.
    """
    lengths = []

    def attend(sequences) -> None:
        _, tree, _, _ = packed.pack(sequences, 64, CPU, whole=True)
        lengths.append(len(tree.group))
        states = [torch.randn(1, len(tree.group), n, 8).transpose(1, 2) for n in (4, 2, 2)]
        for window, learns in ((16, False), (None, False), (16, True), (None, True)):
            with torch.set_grad_enabled(learns):
                given = [x.requires_grad_(learns) for x in states]
                packed.attend(None, *given, None, tree=tree, scaling=0.25, sliding_window=window)

    with FakeTensorMode(allow_non_fake_inputs=True):
        attend([([1] * 300, 1)])  # three blocks, a number that is not one of the heads', as the probe sees to
        assert blocks.frame_count == 4
        for seed in range(30):
            attend(some_sequences(1 + seed % 6, seed))
        attend([([1, 2, 3], 1)])
    assert lengths[0] == 384 and lengths[-1] == 256 and len(set(lengths)) > 5
    assert blocks.frame_count == 4
    assert torch._dynamo.config.recompile_limit >= 64


@pytest.mark.slow
def test_a_run_of_a_model_with_two_windows_stays_below_the_limit(blocks):
    """Probe, reference, training and held-out batches: 8 variants at most, since the probe's inputs are not views."""
    model = build("gemma3")
    with torch.no_grad():
        logprobs.summed_logps(model, some_sequences(1))
    logprobs.summed_logps(model, some_sequences(1))
    assert blocks.frame_count <= 8


def test_what_cannot_be_compiled_raises(blocks):
    """Never FlexAttention without a kernel, which holds the scores of all pairs of tokens."""
    _, tree, _, _ = packed.pack(some_sequences(1), 64, CPU, whole=True)
    states = torch.randn(1, 4, len(tree.group), 16)
    packed.attend_by_blocks(states, states, states, tree, None, 0.5)
    narrow = states[..., :8]
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="fullgraph"):
        packed.attend_by_blocks(narrow, narrow, narrow, tree, None, 0.5)


def test_a_window_as_long_as_the_texts_is_none():
    """So that masks and compiled variants are shared with layers that have no window."""
    _, tree, _, _ = packed.pack([([5] * 8, 3), ([5] * 3 + [6] * 7, 3)], 1 << 20, CPU, whole=True)
    assert tree.longest == 10
    assert tree.block_mask(10) is tree.block_mask(None) and tree.masks(12) is tree.masks(None)
    assert tree.block_mask(9) is not tree.block_mask(None)


# --- the probe of the kernel ------------------------------------------------------------------------------------------


def test_the_kernel_is_tried_as_the_run_will_use_it(blocks, monkeypatch):
    """In the precision of autocast, forward only without gradients, and once for each call."""
    tried = []
    run = attention_kernel._is_right
    monkeypatch.setattr(attention_kernel, "_is_right", lambda *call: tried.append(call) or run(*call))
    model, sequences = build("gemma3"), some_sequences(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logprobs.summed_logps(model, sequences)
        logprobs.summed_logps(model, sequences)
    assert [(c.heads, c.key_heads, c.width, c.window, c.dtype, learns) for c, _, learns in tried] == [
        (4, 2, 16, 16, torch.bfloat16, False),
        (4, 2, 16, None, torch.bfloat16, False),
    ]
    logprobs.summed_logps(model, sequences)
    assert [(c.dtype, learns) for c, _, learns in tried[2:]] == [(torch.float32, True)] * 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory\nmore"), "does not fit"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "load a gcc module, or set CC"),
        (None, "gives other numbers than attention by masks"),
    ],
)
def test_a_kernel_that_fails_is_a_reason_to_pad_and_is_told(blocks, monkeypatch, capsys, error, said):
    """Also where only its backward pass fails: what is read without gradients stays packed."""

    def broken(query, key, value, mask, scale, grouped):
        if not torch.is_grad_enabled():
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
        if error:
            raise error
        return torch.zeros_like(query) * (query.sum() + key.sum() + value.sum())

    monkeypatch.setattr(packed, "compiled_flex", lambda: broken)
    monkeypatch.setattr(attention_kernel, "_is_right", partial(_right_without_gradients, attention_kernel._is_right))
    model, sequences = build("gpt2"), some_sequences(2)
    with torch.no_grad():
        assert logprobs.lay_out([model], sequences).parts[0].tree is not None
    ours = logprobs.summed_logps(model, sequences)
    assert logprobs.lay_out([model], sequences).parts[0].tree is None
    message = capsys.readouterr().err
    assert said in message and "packing changes" not in message and message.count("batches are padded") == 1
    assert torch.allclose(ours, one_by_one(build("gpt2"), sequences), atol=1e-4)


def _right_without_gradients(run, call, device, learns):
    return run(call, device, learns) if learns else True


def test_running_out_of_memory_is_no_reason_to_pad(blocks, monkeypatch):
    def broken(*call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packed, "compiled_flex", lambda: broken)
    with pytest.raises(torch.OutOfMemoryError):
        logprobs.summed_logps(build("gpt2"), some_sequences(1))


def test_a_packed_row_that_the_model_reads_otherwise_is_another_message(blocks, capsys, monkeypatch):
    model = build("gpt2")
    monkeypatch.setattr(probes, "agree", lambda found, expected: False)
    assert not probes.can_pack(model, 64)
    assert "packing changes its hidden states" in capsys.readouterr().err
