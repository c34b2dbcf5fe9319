"""How rows share a batch: every mode gives each row what it gets alone, and the fastest right one is found."""

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

from architectures import reference, zoo
from dpoctl.inference import decoding
from dpoctl.inference.decoding import Mode, mode_of
from dpoctl.inference.generate import PromptTokens, Sampling, generate

# Of those with three tokens, one is there twice, and their order backwards is another.
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [21, 22, 23], [24, 25, 26], [5, 6, 7]]


def check_greedy(model, prompts=PROMPTS, new: int = 16) -> None:
    asked = [PromptTokens(str(i), prompt, frozenset({0})) for i, prompt in enumerate(prompts)]
    found = generate(model, zoo.make_tokenizer(), asked, [0, 1], Sampling(temperature=0, max_new_tokens=new))
    for prompt, row in zip(prompts, found, strict=True):
        expected = reference.greedy(model, prompt, new)
        assert [[t for t in each.ids if t != 0] for each in row] == [expected] * 2


@pytest.mark.parametrize(
    ("name", "options", "mode"),
    [
        ("llama", {}, Mode.PADDED),
        ("qwen3.5", {}, Mode.PADDED),  # masks padding
        ("mamba", {}, Mode.PADDED_PROMPT),
        ("minimax", {"layer_types": ["full_attention", "linear_attention"]}, Mode.ALIGNED),  # a cache of its own
        ("minimax", {}, Mode.UNCACHED),  # which cannot select rows where the last layer is not linear
        ("recurrent-gemma", {}, Mode.UNCACHED),  # keeps states in its modules
    ],
)
def test_the_fastest_right_mode_is_found(name, options, mode):
    model = zoo.make_model(name, **options)
    assert mode_of(model, 40) is mode
    # RecurrentGemma's own cache takes a prompt of one token for a text that goes on
    check_greedy(model, [p for p in PROMPTS if len(p) > 1] if name == "recurrent-gemma" else PROMPTS)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3.5", "mamba2", "granite"])
@pytest.mark.parametrize("mode", [Mode.ALIGNED, Mode.UNCACHED])
def test_slower_modes_give_the_same_samples(name, mode, monkeypatch):
    monkeypatch.setattr(decoding, "mode_of", lambda model, longest: mode)
    check_greedy(zoo.make_model(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "granite", "gpt2", "qwen3.5"])
def test_prompts_forwarded_in_parts_give_the_same_samples(name, monkeypatch):
    """A part of 20 tokens is three columns of these prompts; a window is shorter than the longest one."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 300, (n,), generator=draw).tolist() for n in (3, 40, 1, 21, 40, 7)]
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 20)
    forwarded = []
    forward = decoding._PaddedBatch._forward
    monkeypatch.setattr(
        decoding._PaddedBatch,
        "_forward",
        lambda self, ids, *args, **kwargs: forwarded.append(ids.shape[1]) or forward(self, ids, *args, **kwargs),
    )
    model = zoo.make_model(name)
    mode_of(model, 47)  # the longest text, whose last token is not forwarded
    forwarded.clear()
    check_greedy(model, prompts, 8)
    # recurrent states beside attention: the prompt as a whole
    assert max(forwarded) == (40 if name == "qwen3.5" else 3)


def test_a_cache_that_does_not_reorder_its_rows_is_noticed(monkeypatch):
    monkeypatch.setattr(LinearAttentionLayer, "reorder_cache", lambda self, places: None)
    model = zoo.make_model("lfm2")
    assert mode_of(model, 40) is Mode.UNCACHED
    check_greedy(model)


def test_a_model_that_does_not_mask_padding_gets_prompts_of_equal_length():
    model = zoo.make_model("lfm2")
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    assert mode_of(model, 40) is Mode.ALIGNED
    check_greedy(model)


def test_long_prompts_pass_windows_and_chunks():
    """Longer than a window, and than the 64 tokens that linear attention computes at once."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 300, (n,), generator=draw).tolist() for n in (3, 70, 130, 131)]
    for name in ("qwen3-next", "mistral", "bamba"):
        check_greedy(zoo.make_model(name), prompts, 8)
