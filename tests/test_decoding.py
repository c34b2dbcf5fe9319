"""How rows share a batch: every mode gives each row what it gets alone, and the fastest right one is found."""

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

from architectures import reference, zoo
from dpoctl.inference import captured, decoding
from dpoctl.inference.decoding import Mode, mode_of
from dpoctl.inference.generate import PromptTokens, Sampling, generate
from dpoctl.inference.key_cache import PreallocatedLayer

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


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """Captured steps on a CPU: as a graph does, each repetition overwrites the result. Holds the captures' rows.

    New memory holds NaN, as it may on a GPU.
    """
    rows = []
    new = PreallocatedLayer._buffer_like
    monkeypatch.setattr(PreallocatedLayer, "_buffer_like", lambda self, like: new(self, like).fill_(float("nan")))

    def capture(step):
        first, result = step(), step()  # the second one is not run by a capture, and changes nothing
        rows.append(len(first))
        return first, lambda: result.copy_(step())

    monkeypatch.setattr(captured, "capture", capture)
    can = captured.can_capture
    monkeypatch.setattr(captured, "can_capture", lambda layers, _: can(layers, torch.device("cuda")))
    return rows


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gptj", "phi", "gemma", "qwen3", "granite"])
def test_captured_steps_give_the_same_samples(name, captures):
    """While rows end one after another: half of them leave at once, and the others' step is captured again."""
    model = zoo.make_model(name)
    assert mode_of(model, 40) is Mode.CAPTURED
    check_greedy(model)
    ends = frozenset(range(0, 384, 5))
    asked = [PromptTokens(str(i), prompt, ends) for i, prompt in enumerate(PROMPTS)]
    captures.clear()
    found = generate(model, zoo.make_tokenizer(), asked, [0, 1, 2], Sampling(max_new_tokens=24))
    assert len(captures) > 1 and captures == sorted(captures, reverse=True)
    decoding.assume_mode(model, Mode.PADDED)
    expected = generate(model, zoo.make_tokenizer(), asked, [0, 1, 2], Sampling(max_new_tokens=24))
    assert [[each.ids for each in row] for row in found] == [[each.ids for each in row] for row in expected]


@pytest.mark.parametrize(("name", "mode"), [("mistral", Mode.PADDED), ("mamba", Mode.PADDED_PROMPT)])
def test_caches_of_other_kinds_are_not_captured(name, mode, captures):
    assert mode_of(zoo.make_model(name), 40) is mode and not captures


def test_a_few_steps_are_not_captured(captures):
    model = zoo.make_model("llama")
    check_greedy(model, new=captured.WORTH - 1)
    captures.clear()
    check_greedy(model, new=captured.WORTH - 1)
    assert not captures


def test_a_captured_step_that_is_wrong_is_not_used(captures, monkeypatch):
    """Of a mask that shows all of the cache, zeros change what is attended to."""
    run = captured.CapturedStep.run

    def blind(self, *args):
        self.mask.fill_(True)
        return run(self, *args)

    monkeypatch.setattr(captured.CapturedStep, "run", blind)
    assert mode_of(zoo.make_model("llama"), 40) is Mode.PADDED and captures


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
