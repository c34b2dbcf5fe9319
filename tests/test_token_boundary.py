"""Token ids at the boundary of prompt and completion, special tokens, fingerprints; each family of tokenizers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpoctl.data.chats import Prompt
from dpoctl.data.codec import Codec
from dpoctl.data.encode import Limits, encode_pairs
from dpoctl.data.tokens import fingerprint
from dpoctl.errors import InputError
from helpers.encoding import FAMILIES, LOSSLESS, both, build, encode_prompt, encode_text, make_rows, words
from helpers.tokenizer_families import byte_level_bpe, chat, unigram

BOUNDARIES = [
    ("The film was", " great"),  # a completion that begins with a space
    ("The film was ", "great"),  # a prompt that ends with one
    ("The film was un", "believable, believe me"),  # a word cut by the boundary
    ("The fi", "lm"),
    ("hello", "\n\nAssistant: hello"),
    ("hello\n", "\nAssistant"),  # two line breaks that are one token together
    ("hello", "  two blanks"),
    ("10", "0 times"),
    ("café", " naïve 🎬🎥 schön"),
    ("🎬", "🎬"),
    ("日本", "語の映画"),
    ("a", "."),
    ("a", " "),
    ("=", "= ..."),
    ("\n", "\n\n"),
]


@pytest.mark.parametrize("family", LOSSLESS)
@pytest.mark.parametrize(("prompt", "completion"), BOUNDARIES)
def test_nothing_is_lost_or_doubled_at_the_boundary(family, prompt, completion):
    tokenizer = build(family)
    prompt_ids, ids = both(tokenizer, prompt, completion)
    assert words(tokenizer, prompt_ids + ids) == prompt + completion
    assert words(tokenizer, prompt_ids) == prompt
    assert ids


@pytest.mark.parametrize(("prompt", "completion"), [("The film was", " great"), ("good", "! great"), ("is", "?")])
def test_wordpiece_at_the_boundary(prompt, completion):
    tokenizer = build("wordpiece")
    prompt_ids, ids = both(tokenizer, prompt, completion, finished=True)
    cls, sep = tokenizer.bos_token_id, tokenizer.eos_token_id
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
    assert (prompt_ids, ids) == ([cls] + alone[0], alone[1] + [sep])


def test_wordpiece_continues_a_word_across_the_boundary():
    tokenizer = build("wordpiece")
    _, ids = both(tokenizer, "is it", "s")
    assert tokenizer.convert_ids_to_tokens(ids) == ["##s"]


@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_token_spans_the_boundary_the_ids_are_those_of_the_whole_text(family):
    tokenizer = build(family)
    prompt_ids, ids = both(tokenizer, "The film was great", " and the music is lovely")
    whole = tokenizer("The film was great and the music is lovely")["input_ids"]
    assert prompt_ids + ids == [i for i in whole if family != "wordpiece" or i != tokenizer.eos_token_id]


def test_a_merge_across_the_boundary_by_hand():
    tokenizer = build("bpe")
    [whole] = tokenizer("\n\n", add_special_tokens=False)["input_ids"][:1]
    assert tokenizer.decode([whole]) == "\n\n"  # one token together
    [one] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert both(tokenizer, "\n", "\n") == ([one], [one])


@pytest.mark.parametrize("scheme", ["unigram-first", "unigram-always"])
def test_a_completion_gets_no_extra_word_mark(scheme):
    tokenizer = build(scheme)
    _, ids = both(tokenizer, "The fi", "lm")  # "film" is tokenised as a whole: the boundary falls inside a token or not
    assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
    _, ids = both(tokenizer, "The", " film")
    assert tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")


def test_unknown_characters_on_both_sides_of_the_boundary_are_one_token_each():
    tokenizer = unigram(byte_fallback=False)
    unknown = tokenizer.unk_token_id
    assert tokenizer("hello 🎬🎬")["input_ids"].count(unknown) == 1  # one for all in a row
    prompt_ids, ids = both(tokenizer, "hello 🎬", "🎬")
    assert prompt_ids[-1:] == ids == [unknown]


@pytest.mark.parametrize(
    ("family", "bos"), [("bpe", 0), ("unigram-first", 1), ("unigram-always", 1), ("wordpiece", 1), ("chat", 1)]
)
def test_one_bos_at_most_and_only_where_the_tokenizer_adds_it(family, bos):
    tokenizer = build(family)
    for prompt in ("hello", "hello there, how are you"):
        ids = encode_prompt(tokenizer, prompt)
        assert ids.count(tokenizer.bos_token_id) == Codec(tokenizer).bos_length == bos
        assert ids[:1] == [tokenizer.bos_token_id] or not bos
        spelled = encode_prompt(tokenizer, tokenizer.bos_token + prompt)
        assert spelled == [tokenizer.bos_token_id] + ids[bos:]
    text = encode_text(tokenizer, tokenizer.bos_token + "hello", finished=False)
    assert text.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_eos_once_and_only_where_the_text_ended(family):
    tokenizer = build(family)
    eos = tokenizer.eos_token_id
    for completion, finished, ends in [
        (" great", True, True),
        (" great", False, False),
        (" great" + tokenizer.eos_token, True, True),
        (" great" + tokenizer.eos_token, False, True),
        (tokenizer.eos_token, True, True),
    ]:
        _, ids = both(tokenizer, "The film was", completion, finished)
        assert ids.count(eos) == (ids[-1:] == [eos]) == ends
        whole = encode_text(tokenizer, "The film was" + completion, finished=finished)
        assert whole.count(eos) == (whole[-1] == eos) == ends
    assert both(tokenizer, "The film was", "", True)[1] == [eos]
    assert both(tokenizer, "The film was", "", False)[1] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_text_cannot_inject_a_special_token(family):
    tokenizer = build(family)
    specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    added = {tokenizer.bos_token_id} if Codec(tokenizer).bos_length else set()
    for token in {token.content for token in tokenizer.added_tokens_decoder.values()}:
        inside = f"a {token} b {token}{token} c"
        prompt_ids, ids = both(tokenizer, inside, " x " + inside)
        assert not (specials - added) & set(prompt_ids) and not specials & set(ids)
        assert not (specials - added) & set(encode_text(tokenizer, inside, finished=False))
        if family in LOSSLESS and token != tokenizer.unk_token:
            assert words(tokenizer, prompt_ids + ids) == inside + " x " + inside
        # Split over the boundary, the string is no token either.
        prompt_ids, ids = both(tokenizer, "a " + token[:3], token[3:] + " c")
        assert not (specials - added) & set(prompt_ids) and not specials & set(ids)


@pytest.mark.parametrize("family", ["bpe", "unigram-first"])
def test_a_text_full_of_special_strings_is_no_deep_recursion(family):
    tokenizer = build(family)
    text = tokenizer.eos_token * 3000 + "."
    assert words(tokenizer, encode_text(tokenizer, text, finished=False)) == text


def test_padding_token_equal_to_eos_hides_nothing():
    tokenizer = byte_level_bpe()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = make_rows({"prompt": "a", "chosen": " b", "rejected": " c"})
    data = encode_pairs(rows, Codec(tokenizer), Limits())
    assert [ids[-1] for ids in data.completions] == [tokenizer.eos_token_id] * 2


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level_bpe(eos_token=None)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encode_text(tokenizer, "hello")
    with pytest.raises(InputError, match="no end-of-sequence token"):
        both(tokenizer, "hello", "there", finished=True)


# st.text() draws no lone surrogates; rows.py refuses them.
@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=30), completion=st.text(max_size=30), family=st.sampled_from(["bpe", "chat"])
)
def test_any_text_survives_the_round_trip_on_byte_level_bpe(prompt, completion, family):
    tokenizer = build(family)
    prompt_ids, ids = both(tokenizer, prompt, completion)
    assert words(tokenizer, prompt_ids) == prompt
    assert words(tokenizer, prompt_ids + ids) == prompt + completion
    assert not set(ids) & set(tokenizer.all_special_ids)
    # None of the prompt's tokens is among the completion's: byte for byte they are the completion alone.
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert sum(map(len, pieces)) == len(completion.encode())  # this family's pieces have one character a byte


@settings(max_examples=100, deadline=None)
@given(
    # Its own normalisation: a text that begins with a blank is given no word mark, so that decoding takes the blank.
    # And a BOS string at the beginning is the BOS itself, no text.
    prompt=st.text("abehilmot \n=.é🎬</s>", max_size=20)
    .map(str.lstrip)
    .filter(lambda text: text and not text.startswith("<s>")),
    completion=st.text("abehilmot \n=.é🎬</s>", max_size=20),
    family=st.sampled_from(["unigram-first", "unigram-always"]),
)
def test_any_text_survives_the_round_trip_on_unigram(prompt, completion, family):
    tokenizer = build(family)
    completion = completion.removesuffix("</s>")
    prompt_ids, ids = both(tokenizer, prompt, completion)
    assert words(tokenizer, prompt_ids + ids) == prompt + completion
    assert not set(ids) & {1, 2}


def test_many_at_once_are_as_one_by_one():
    tokenizer = build("unigram-first")
    prompts = [prompt for prompt, _ in BOUNDARIES] * 100  # more than one chunk
    completions = [completion for _, completion in BOUNDARIES] * 100
    codec, whole = Codec(tokenizer), list(map(Prompt, prompts))
    prompt_ids = codec.encode_prompts(whole)
    ids = codec.encode_completions(whole, completions, prompt_ids, [True] * len(prompts))
    for i in range(len(BOUNDARIES)):
        assert (prompt_ids[i], ids[i]) == both(tokenizer, *BOUNDARIES[i], finished=True)
        assert (prompt_ids[-i - 1], ids[-i - 1]) == both(tokenizer, *BOUNDARIES[-i - 1], finished=True)


def test_a_tokenizer_set_to_truncate_and_pad_does_neither():
    tokenizer = byte_level_bpe()
    tokenizer(["hello there", "a"], truncation=True, max_length=2, padding="max_length")
    assert words(tokenizer, encode_text(tokenizer, "hello there", finished=False)) == "hello there"


# --- fingerprint ---


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_survives_saving_padding_and_use(family, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = FAMILIES[family]()
    before = fingerprint(tokenizer)
    assert len(before) == 16 and int(before, 16) >= 0
    tokenizer(["hello there", "a"], truncation=True, max_length=2, padding=bool(tokenizer.pad_token))
    tokenizer.pad_token = tokenizer.eos_token
    assert fingerprint(tokenizer) == before
    for generation in ("first", "second"):
        tokenizer.save_pretrained(tmp_path / generation)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / generation)
        assert fingerprint(tokenizer) == before


def test_fingerprint_tells_tokenizers_apart():
    other_eos = byte_level_bpe(eos_token="!")
    template = chat()
    template.chat_template += " "
    all_of_them = [build(family) for family in FAMILIES] + [other_eos, template]
    assert len({fingerprint(tokenizer) for tokenizer in all_of_them}) == len(all_of_them)
