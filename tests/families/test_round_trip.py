"""Encoding a sample gives the sample, and training ends where sampling does: random chats and texts, no model."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpoctl.data.answers import answer_of, encode_answers, row_tokens
from dpoctl.data.chats import Prompt, TemplateOptions
from dpoctl.data.codec import Codec
from dpoctl.data.encode import Limits, encode_examples, encode_pairs
from dpoctl.inference.completions import PromptSet, completion_rows
from dpoctl.inference.generate import Completion
from dpoctl.inference.pairing import preference
from families import reference, zoo
from helpers.encoding import make_rows

EXAMPLES = settings(max_examples=40, deadline=None)
WORDS = ("It", " is", " old", "\n", "\n\n", " ", "  ", "!", "10", "é", "日本", "🎬", "\u0301", "<", ">", "|", "[INST]")
SPECIAL = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<eos>", "</s>", "<|end|>", "<think>\n", "</think>", "<|user|>")
PLAIN = st.lists(st.sampled_from(WORDS[:12]), min_size=1, max_size=8).map("".join).filter(str.strip)
TEXT = st.lists(st.sampled_from(WORDS + SPECIAL), min_size=1, max_size=8).map("".join).filter(str.strip)


def codec_of(name: str) -> Codec:
    return Codec(zoo.tokenizer_of(name), zoo.end_ids(name))


def prompts(name: str, text):
    """Prompts of a family: a text, or a chat of one question or of two."""
    asked = text.map(lambda said: [{"role": "user", "content": said}])
    followed = st.tuples(text, text, text).map(
        lambda said: [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), said, strict=True)]
    )
    return st.one_of(text, asked, followed) if name in zoo.CHATS else text


def samples(name: str, prompt) -> st.SearchStrategy[tuple[list[int], str]]:
    """(ids, finish) of what a model may say, special tokens among them, up to an end token or to a limit."""
    stops = sorted(zoo.stops(name, prompt))
    said = st.lists(st.integers(0, len(zoo.tokenizer_of(name)) - 1).filter(lambda id: id not in stops), max_size=8)
    ended = st.tuples(said, st.sampled_from(stops)).map(lambda both: ([*both[0], both[1]], "stop"))
    return ended | said.filter(bool).map(lambda ids: (ids, "length"))


def written(codec: Codec, prompt, sampled: list[tuple[list[int], str]]) -> list[dict]:
    """Completion rows of a prompt, as a command writes them and another one reads them."""
    [ids] = codec.encode_prompts([Prompt(prompt)])
    found = [
        Completion(said, codec.tokenizer.decode(said[:-1] if how == "stop" else said), how) for said, how in sampled
    ]
    rows = completion_rows(PromptSet([{"prompt_id": "p", "prompt": prompt}], [ids], codec, {}), [found])
    return json.loads(json.dumps(rows))


@pytest.mark.parametrize("name", zoo.FAMILIES)
@EXAMPLES
@given(data=st.data())
def test_a_sample_is_encoded_as_what_was_sampled(name, data):
    codec, prompt = codec_of(name), data.draw(prompts(name, TEXT))
    (one, how), (other, how_other) = (data.draw(samples(name, prompt)) for _ in range(2))
    rows = written(codec, prompt, [(one, how), (other, how_other)])
    before = rows[0]["prompt_ids"]

    data_rows = make_rows(*rows)
    encoded = encode_answers(data_rows, codec, [answer_of(data_rows, n, "completion") for n in range(2)])
    assert encoded.prompts == [before, before] and encoded.completions == [one, other] and not encoded.edited
    assert row_tokens(codec, rows[0], finished=how == "stop") == (before, one, ())

    examples, counts = encode_examples(data_rows, codec, Limits())
    assert [(e.ids, e.start, e.gaps) for e in examples] == [(before + ids, len(before), []) for ids in (one, other)]
    assert counts["from_ids"] == 2 and counts["trained_tokens"] == len(one) + len(other)

    if one != other:
        pair = json.loads(json.dumps(preference(rows[0] | {"score": 1.0}, rows[1] | {"score": 0.0})))
        found = encode_pairs(make_rows(pair), codec, Limits())
        [(chosen, rejected)] = found.pairs
        assert (found.completions[chosen], found.completions[rejected]) == (one, other) and found.prompts == [before]


@pytest.mark.parametrize("name", zoo.FAMILIES)
@EXAMPLES
@given(data=st.data())
def test_what_is_trained_ends_where_sampling_ends(name, data):
    codec, prompt, answer = codec_of(name), data.draw(prompts(name, TEXT)), data.draw(TEXT)
    [before] = codec.encode_prompts([Prompt(prompt)])
    [ids] = codec.encode_completions([Prompt(prompt)], [answer], [before], [True])
    [open_ended] = codec.encode_completions([Prompt(prompt)], [answer], [before], [False])
    stops = zoo.stops(name, prompt)
    assert codec.stops_of(Prompt(prompt)) == stops
    assert ids[-1] in stops and not stops & set(ids[:-1])
    if not (codec.tokenizer.eos_token and answer.endswith(codec.tokenizer.eos_token)):
        assert not stops & set(open_ended)
        said = codec.tokenizer.decode(open_ended)
        opened = name == "thinking" and answer.strip() == "<think>"  # which the prompt has written already
        assert opened or said.strip().endswith(answer.strip()[-1])


@pytest.mark.parametrize("name", zoo.FAMILIES)
@EXAMPLES
@given(data=st.data())
def test_a_text_is_encoded_as_plain_transformers_does(name, data):
    """Where prompt and answer have the prompt's ids first."""
    codec, prompt, answer = codec_of(name), data.draw(prompts(name, PLAIN)), data.draw(PLAIN)
    tokenizer = codec.tokenizer
    [before] = codec.encode_prompts([Prompt(prompt)])
    assert before == reference.prompt_ids(tokenizer, prompt)
    [ids] = codec.encode_completions([Prompt(prompt)], [answer], [before], [True])
    try:
        expected, start = reference.answer_ids(tokenizer, prompt, answer, zoo.stops(name, prompt))
    except AssertionError:  # a token spans the boundary, or the template opens a thought
        return
    assert before + ids == expected and start == len(before)


@EXAMPLES
@given(prompt=prompts("qwen3", PLAIN), answer=PLAIN)
def test_template_arguments(prompt, answer):
    """With thoughts turned off the prompt closes an empty thought, and the answer does not open another one."""
    tokenizer, off = zoo.tokenizer_of("qwen3"), {"enable_thinking": False}
    codec = Codec(tokenizer, zoo.end_ids("qwen3"), TemplateOptions(arguments=off))
    [before] = codec.encode_prompts([Prompt(prompt)])
    assert before == reference.prompt_ids(tokenizer, prompt, **({} if isinstance(prompt, str) else off))
    [of_row] = Codec(tokenizer).encode_prompts([Prompt(prompt, arguments=off)])
    assert of_row == before
    [ids] = codec.encode_completions([Prompt(prompt)], [answer], [before], [True])
    shown = tokenizer.decode(before + ids)
    assert shown.count("<think>") == (0 if isinstance(prompt, str) else 1)
    assert tokenizer.decode(ids[:-1]).strip() == tokenizer.decode(tokenizer(answer)["input_ids"]).strip()
