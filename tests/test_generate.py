"""Generation: the sampler's distribution, agreement with transformers' own generate, and independence of rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpoctl.errors import InputError, NumericalError
from dpoctl.inference import decoding
from dpoctl.inference import generate as generate_module
from dpoctl.inference.generate import PromptTokens, Sampling, batch_slices, generate
from dpoctl.inference.token_sampling import sample_token, sample_token_from_states, uniforms
from helpers.tiny_models import tiny_model

ARCHITECTURES = ["gpt2", "neox", "llama", "qwen2", "mistral"]
PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 12, 13], [14], [5, 6, 7, 8], [20, 21, 22]]


def make_model(kind="gpt2", vocab=64, context=48, std=0.3):
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return tiny_model(kind, vocab=vocab, context=context, heads=2 if kind == "gpt2" else 4, std=std, **ids)


def make_tokenizer(vocab=64):
    """Id 0 is the EOS, every other one or two letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<eos>", *letters, *[a + "y" for a in letters], *[a + "z" for a in letters]][:vocab]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


EOS = frozenset({0})
NEVER: frozenset[int] = frozenset()  # full length: every position is compared


def named(prompts, keys=None, stops=EOS):
    """Prompts to sample from; `keys` are p0, p1, ... by default."""
    keys = keys or [f"p{i}" for i in range(len(prompts))]
    return [PromptTokens(key, ids, stops) for key, ids in zip(keys, prompts, strict=True)]


def ids_of(result):
    return [[completion.ids for completion in row] for row in result]


# ---- sample_token: the distribution


def allotted(logits, n, **options):
    """How often each token is chosen over n equally spaced u: n * probability, but for the two ends of its interval."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    chosen = sample_token(logits.expand(n, -1).clone(), u, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options)
    return np.bincount(chosen.numpy(), minlength=logits.shape[-1])


def exact(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The target distribution in float64, written from the definitions: temperature, then top-k, then the nucleus."""
    logits = logits.numpy().astype(np.float64) / temperature
    probs = np.exp(logits - logits.max())
    order = np.argsort(-probs, kind="stable")
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    mass = 0.0
    for token in order:
        if mass >= top_p:
            probs[token] = 0
        mass += probs[token]
    return probs / probs.sum()


@pytest.mark.parametrize("vocab", [5, 256, 700])  # less than a tile, one tile, tiles and a rest
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_k": 10_000},
        {"top_p": 0.3},
        {"top_p": 0.999},  # more than the first 128 of the 700 are in the nucleus
        {"temperature": 1.3, "top_k": 200, "top_p": 0.8},
    ],
)
def test_sample_token_gives_each_token_its_share_of_the_unit_interval(vocab, options):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, vocab)).float()
    n = 4000
    # A token owns one interval of u (two-level search included); a grid of n points puts n * p +- 1 into it.
    assert np.abs(allotted(logits, n, **options) - n * exact(logits, **options)).max() <= 1 + 1e-2


# less than a tile of the head, one tile, tiles and a rest, more than the tiles of one product in bfloat16
@pytest.mark.parametrize("vocab", [5, 1024, 2500, 9000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_gives_the_same_shares(vocab, temperature, dtype):
    draw = np.random.default_rng(1)
    state, weight = (torch.from_numpy(draw.normal(0, 1, shape)).to(dtype) for shape in ((1, 6), (vocab, 6)))
    n = 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = np.bincount(sample_token_from_states(state.expand(n, -1), weight, u, temperature).numpy(), minlength=vocab)
    assert np.abs(counts - n * exact((weight @ state[0]).float(), temperature)).max() <= 1 + 1e-2
    with pytest.raises(NumericalError, match="not finite"):
        sample_token_from_states(state * torch.nan, weight, u[:1], temperature)


def test_sample_token_never_draws_what_has_no_probability_even_at_the_ends():
    logits = torch.full((600,), -torch.inf)
    logits[[300, 599]] = 0.0
    ends = torch.tensor([0.0, 0.5 - 1e-16, 0.5, 1 - 2**-53], dtype=torch.float64)
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}):
        drawn = sample_token(
            logits.expand(4, -1).clone(), ends, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
        ).tolist()
        assert set(drawn) <= {300, 599} and drawn[0] != drawn[3]


def test_a_small_temperature_and_zero_take_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]])
    u = torch.tensor([0.999, 0.999], dtype=torch.float64)
    for temperature in (0.0, 1e-3):
        assert sample_token(logits.clone(), u, temperature=temperature, top_k=0, top_p=1.0).tolist() == [1, 0]


def test_logits_that_are_not_finite_are_refused():
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NumericalError, match="not finite"):
            sample_token(torch.tensor([[0.0, bad]]), torch.zeros(1).double(), temperature=1.0, top_k=0, top_p=1.0)


def test_uniforms_are_a_function_of_seed_prompt_and_k():
    first = uniforms(1, "p", 2, 8)
    assert (uniforms(1, "p", 2, 3) == first[:3]).all()  # a longer request has the same beginning
    others = [uniforms(2, "p", 2, 8), uniforms(1, "q", 2, 8), uniforms(1, "p", 3, 8), uniforms(12, "p", 2, 8)]
    assert all((first != other).all() for other in others)
    many = np.concatenate([uniforms(0, f"p{i}", k, 10) for i in range(500) for k in range(4)])
    # 20,000 uniforms in 20 cells: chi-square with 19 degrees of freedom, mean 19, sd 6.2; 4 sd above.
    counts = np.histogram(many, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 44


# ---- generate


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_greedy_of_transformers(kind):
    model, tokenizer = make_model(kind), make_tokenizer()
    model.generation_config.eos_token_id = None
    ours = generate(model, tokenizer, named(PROMPTS, stops=NEVER), [0], Sampling(temperature=0, max_new_tokens=20))
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[1] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=1)
    assert [row[0] for row in ids_of(ours)] == theirs[:, width:].tolist()
    assert {completion.finish for row in ours for completion in row} == {"length"}


def test_two_tokens_follow_the_model_s_joint_distribution():
    model, tokenizer = make_model(vocab=7, std=0.5), make_tokenizer(7)
    prompt, n = [3, 1], 3000
    sampling = Sampling(temperature=0.8, max_new_tokens=2, seed=3)
    result = generate(model, tokenizer, named([prompt], ["p"]), list(range(n)), sampling)
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.8).softmax(-1)
        after = torch.tensor([[*prompt, a] for a in range(7)])
        second = (model(after).logits[:, -1].double() / 0.8).softmax(-1)
    expected = {(0,): first[0].item()}  # EOS at once
    expected |= {(a, b): (first[a] * second[a, b]).item() for a in range(1, 7) for b in range(7)}
    counts = dict.fromkeys(expected, 0)
    for completion in result[0]:
        counts[tuple(completion.ids)] += 1
    chi = sum((counts[cell] - n * p) ** 2 / (n * p) for cell, p in expected.items())
    df = len(expected) - 1
    assert chi < df + 4 * (2 * df) ** 0.5  # 4 standard deviations; the seed is fixed


def test_a_row_is_the_same_whatever_shares_its_batch():
    model, tokenizer = make_model(), make_tokenizer()
    sampling = Sampling(max_new_tokens=24, top_p=0.95, seed=5)
    together = ids_of(generate(model, tokenizer, named(PROMPTS), [0, 1, 2, 3], sampling))
    for i, prompt in enumerate(PROMPTS):
        alone = ids_of(generate(model, tokenizer, named([prompt], [f"p{i}"]), [2], sampling))
        assert alone == [[together[i][2]]]
    backwards = ids_of(generate(model, tokenizer, named(PROMPTS)[::-1], [3, 0], sampling))
    assert backwards == [[row[3], row[0]] for row in together[::-1]]
    other_seed = ids_of(generate(model, tokenizer, named(PROMPTS), [0, 1, 2, 3], replace(sampling, seed=6)))
    assert all(a != b for a, b in zip(together, other_seed, strict=True))
    assert len({tuple(ids) for ids in together[1]}) == 4  # the ks of a prompt differ


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_rows_that_leave_the_batch_change_nothing(monkeypatch, kind):
    model, tokenizer = make_model(kind, vocab=12, std=0.1), make_tokenizer(12)
    prompts = [[1 + i % 11] * (1 + i % 4) for i in range(12)]
    sampling = Sampling(max_new_tokens=30)
    decoding.mode_of(model, 48)  # tried once, here
    sizes = []
    model.base_model.register_forward_pre_hook(lambda m, a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    compacted = generate(model, tokenizer, named(prompts), [0, 1], sampling)
    assert min(sizes) < 24 / 2 and max(sizes) == 24
    monkeypatch.setattr(decoding, "_COMPACT_AT", 2.0)
    sizes.clear()
    assert compacted == generate(model, tokenizer, named(prompts), [0, 1], sampling)
    assert set(sizes[1:]) == {24}


def test_a_prompt_is_run_once_for_all_its_completions():
    model, tokenizer = make_model(), make_tokenizer()
    decoding.mode_of(model, 48)  # tried once, here
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    prompts = named([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    result = generate(model, tokenizer, prompts, [0, 1, 2], Sampling(max_new_tokens=3))
    assert shapes[0] == (2, 7) and shapes[1] == (9, 1)  # two different prompts; then nine rows, a token each
    assert result[0] != result[2]  # the same prompt under another key has other random numbers


def test_an_end_token_ends_a_row_and_is_its_last_id():
    model, tokenizer = make_model(vocab=12, std=0.1), make_tokenizer(12)
    ks, sampling = list(range(64)), Sampling(max_new_tokens=8)
    [result] = generate(model, tokenizer, named([[4]]), ks, sampling)
    assert {completion.finish for completion in result} == {"stop", "length"}
    for completion in result:
        ended = completion.finish == "stop"
        assert completion.ids.count(0) == (completion.ids[-1] == 0) == ended
        assert len(completion.ids) == 8 or ended  # the end counts
        assert completion.text == tokenizer.decode(completion.ids[:-1] if ended else completion.ids)
    # Several ids may end an answer: the one that was sampled is kept, and no other put in its place.
    [again] = generate(model, tokenizer, named([[4]], stops=frozenset({0, 3})), ks, sampling)
    assert {completion.ids[-1] for completion in again if completion.finish == "stop"} == {0, 3}
    for before, after in zip(result, again, strict=True):
        assert after.ids == (before.ids[: before.ids.index(3) + 1] if 3 in before.ids else before.ids)


def test_each_prompt_has_its_own_end_tokens():
    model, tokenizer = make_model(vocab=12, std=0.1), make_tokenizer(12)
    ks, sampling = list(range(32)), Sampling(max_new_tokens=8)
    text, chat = named([[4]], ["p"])[0], named([[5, 6]], ["q"], frozenset({0, 3}))[0]
    together = generate(model, tokenizer, [text, chat], ks, sampling)
    assert together == [generate(model, tokenizer, [prompt], ks, sampling)[0] for prompt in (text, chat)]
    ends = [{completion.ids[-1] for completion in row if completion.finish == "stop"} for row in together]
    assert ends == [{0}, {0, 3}]


def test_a_stop_string_ends_a_row_and_the_text_before_it():
    model, tokenizer = make_model(), make_tokenizer()
    draw = {"prompts": named(PROMPTS, stops=NEVER), "ks": [0, 1]}
    free = generate(model, tokenizer, **draw, sampling=Sampling(max_new_tokens=30))
    text = free[1][0].text
    for stop in (text[10:12], text[11:15], text[12]):  # some within a token, some over two or three
        stopped = generate(model, tokenizer, **draw, sampling=Sampling(max_new_tokens=30, stop=(stop, "never")))
        for before, after in zip(sum(free, []), sum(stopped, []), strict=True):
            assert after.text == before.text.split(stop)[0]
            assert after.finish == ("stop" if stop in before.text else "length")
            assert after.ids == before.ids[: len(after.ids)] and after.text.startswith(tokenizer.decode(after.ids))
            assert len(after.text) - len(tokenizer.decode(after.ids)) < 2  # as many whole tokens as the text holds


def test_the_context_bounds_the_length_and_a_full_one_is_refused():
    model, tokenizer = make_model("gpt2", context=16), make_tokenizer()
    prompts = named([[1] * 13, [2] * 4], ["a", "b"], NEVER)
    result = generate(model, tokenizer, prompts, [0], Sampling(max_new_tokens=10))
    assert [len(row[0].ids) for row in result] == [3, 10]
    alone = generate(model, tokenizer, prompts[1:], [0], Sampling(max_new_tokens=10))
    assert result[1] == alone[0]
    with pytest.raises(InputError, match="prompt b: its 16 tokens leave no room .* of 16"):
        generate(model, tokenizer, named([[1], [1] * 16], ["a", "b"]), [0], Sampling())
    with pytest.raises(InputError, match="prompt a: it has no tokens"):
        generate(model, tokenizer, named([[]], ["a"]), [0], Sampling())


def test_a_leading_space_survives_tokenizers_that_drop_it_at_a_start():
    words = ["<eos>", "▁the", "▁film", "▁was", "s"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert tokenizer.decode([3]) == "was"
    assert generate_module._text_after(tokenizer, [1, 2], [3]) == " was"
    assert generate_module._text_after(tokenizer, [1, 2], [4, 3]) == "s was"


def test_batches_are_fixed_slices_of_consecutive_prompts():
    assert batch_slices(10, 4, 16) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert batch_slices(3, 1000, 16) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert batch_slices(0, 4) == []
