"""vLLM beside the local sampler, on the same models and prompts: ids, distributions, ends, seeds, adapters."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpoctl.data.chats import Prompt
from dpoctl.inference.generate import PromptTokens, Sampling
from dpoctl.models.logprobs import response_logps
from dpoctl.models.most_probable import most_probable
from helpers.distributions import p_value, restricted

from .conftest import open_pair, save_model

pytestmark = pytest.mark.vllm

TEXTS = ["The film was", "A dull", "Question: is the ending good?", "Human: hello there", "The end"] * 4
GREEDY = Sampling(temperature=0, max_new_tokens=32)


def prompts_of(pair, stops: frozenset[int] | None = None) -> list[PromptTokens]:
    codec = pair.here.codec
    ids = codec.encode_prompts([Prompt(text) for text in TEXTS])
    return [PromptTokens(str(i), each, stops or codec.stops_of(Prompt(""))) for i, each in enumerate(ids)]


def test_greedy_completions_are_those_of_the_local_sampler(pair):
    prompts = prompts_of(pair)
    free = pair.here.complete(prompts, [0], GREEDY)
    stops = prompts[0].stops | {c.ids[9] for (c,) in free[:2]}  # so that some texts end, in both at the same token
    ends = set()
    for given in (prompts, [prompt._replace(stops=stops) for prompt in prompts]):
        expected = pair.here.complete(given, [0], GREEDY)
        found = pair.vllm.complete(given, [0], GREEDY)
        assert [(c.ids, c.text, c.finish) for (c,) in found] == [(c.ids, c.text, c.finish) for (c,) in expected]
        ends |= {c.finish for (c,) in found}
    assert ends == {"stop", "length"}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_alternatives_are_the_distributions_of_the_local_sampler(pair, temperature):
    """The most probable tokens at each place, greedy and at the temperature that is sampled."""
    prompts, sampling = prompts_of(pair)[:4], Sampling(temperature=temperature, max_new_tokens=8)
    pair.vllm.alternatives = 5
    try:
        found = [c for (c,) in pair.vllm.complete(prompts, [0], sampling)]
    finally:
        pair.vllm.alternatives = 0
    sequences = [(p.ids + c.ids, len(p.ids)) for p, c in zip(prompts, found, strict=True)]
    expected = most_probable(pair.here.policy.model, sequences, 40, temperature or 1.0)
    for completion, distributions in zip(found, expected, strict=True):
        assert len(completion.alternatives) == len(completion.ids) == len(distributions)
        for listed, distribution, token in zip(completion.alternatives, distributions, completion.ids, strict=True):
            assert token in listed and 5 <= len(listed) <= 6
            near = {id: distribution[id] for id in listed if id in distribution}
            assert len(near) >= 5 and all(abs(listed[id] - logp) < 1e-3 for id, logp in near.items())


def test_the_end_tokens_of_a_chat_end_its_answers(pair):
    codec = pair.here.codec
    if codec.tokenizer.chat_template is None:
        pytest.skip("a family without a chat template")
    chat = Prompt([{"role": "user", "content": "hello"}])
    (ids,) = codec.encode_prompts([chat])
    end = codec.end_of(chat)
    prompt = PromptTokens("chat", ids, codec.stops_of(chat))
    sampling = Sampling(temperature=2.0, max_new_tokens=64, seed=1)
    found = [c for c in pair.vllm.complete([prompt], list(range(256)), sampling)[0]]
    ended = [c for c in found if c.finish == "stop"]
    assert ended and all(c.ids[-1] == end and end not in c.ids[:-1] and "<|im_end|>" not in c.text for c in ended)
    assert all(len(c.ids) == 64 and end not in c.ids for c in found if c.finish == "length")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=1.2, top_k=7),
    ],
    ids=["plain", "cold", "top-p", "top-k"],
)
def test_tokens_are_drawn_from_the_models_distribution(pair, sampling):
    sampling = replace(sampling, max_new_tokens=2, seed=7)
    prompt = prompts_of(pair)[0]._replace(stops=frozenset())
    (found,) = pair.vllm.complete([prompt], list(range(4000)), sampling)
    model = pair.here.policy.model
    with torch.no_grad():
        first = restricted(model(torch.tensor([prompt.ids])).logits[0, -1], sampling)
    drawn = torch.tensor([c.ids[0] for c in found])
    assert p_value(torch.bincount(drawn, minlength=len(first)).double(), first) > 1e-3
    likely = int(drawn.mode().values)
    with torch.no_grad():
        second = restricted(model(torch.tensor([[*prompt.ids, likely]])).logits[0, -1], sampling)
    after = torch.tensor([c.ids[1] for c in found if c.ids[0] == likely])
    assert p_value(torch.bincount(after, minlength=len(second)).double(), second) > 1e-3


def test_a_row_depends_on_its_seed_alone(pair):
    prompts, sampling = prompts_of(pair), Sampling(max_new_tokens=24, seed=3)
    six = pair.vllm.complete(prompts, list(range(6)), sampling)
    two = pair.vllm.complete(prompts[:3], [1, 4], sampling)
    assert [[c.ids for c in row] for row in two] == [[row[1].ids, row[4].ids] for row in six[:3]]
    assert len({tuple(c.ids) for c in six[0]}) == 6
    other = pair.vllm.complete(prompts[:3], [1, 4], replace(sampling, seed=4))
    assert all(a.ids != b.ids for x, y in zip(two, other, strict=True) for a, b in zip(x, y, strict=True))


def test_log_probs_are_those_of_the_sampled_distribution(pair):
    prompts, sampling = prompts_of(pair)[:5], Sampling(temperature=0.7, max_new_tokens=16)
    found = [row[0] for row in pair.vllm.complete(prompts, [0], sampling)]
    sequences = [(prompt.ids + c.ids, len(prompt.ids)) for prompt, c in zip(prompts, found, strict=True)]
    ours = response_logps(pair.here.policy.model, sequences, tokens_per_batch=4096, temperature=0.7)
    assert torch.tensor([c.logp for c in found]) == pytest.approx(ours, abs=1e-3)


def test_stop_strings_end_texts_at_the_same_place(tmp_path):
    pair = open_pair(save_model(tmp_path / "m", "gpt2"))
    prompts = prompts_of(pair)
    plain = pair.here.complete(prompts, [0], GREEDY)
    text = max((c.text for (c,) in plain), key=len)
    stop = (text[6:9], text[12:14])  # within tokens and across them
    sampling = replace(GREEDY, stop=stop)
    expected = pair.here.complete(prompts, [0], sampling)
    with pair.vllm:
        found = pair.vllm.complete(prompts, [0], sampling)
        assert [(c.ids, c.text, c.finish) for (c,) in found] == [(c.ids, c.text, c.finish) for (c,) in expected]
        assert any(c.finish == "stop" for (c,) in found)
        drawn = pair.vllm.complete(prompts, list(range(8)), Sampling(max_new_tokens=32, stop=("e",)))
    assert all("e" not in c.text for row in drawn for c in row) and any(
        c.finish == "stop" for row in drawn for c in row
    )


def test_an_adapter_is_applied_to_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = save_model(tmp_path / "base", "llama")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    pair = open_pair(tmp_path / "adapter")  # merged here, applied by vLLM
    prompts = prompts_of(pair)
    expected = pair.here.complete(prompts, [0], GREEDY)
    with pair.vllm:
        found = pair.vllm.complete(prompts, [0], GREEDY)
    assert [c.ids for (c,) in found] == [c.ids for (c,) in expected]
    plain = open_pair(base).here.complete(prompts, [0], GREEDY)
    assert sum(a.ids != b.ids for (a,), (b,) in zip(plain, found, strict=True)) > len(prompts) // 2
