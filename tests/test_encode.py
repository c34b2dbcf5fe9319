"""Examples and pairs from rows: truncation, order, end tokens, stored token ids, what is dropped and counted."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpoctl.data.codec import Codec
from dpoctl.data.encode import Example, Limits, encode_examples, encode_pairs, truncate
from dpoctl.data.tokens import fingerprint
from dpoctl.errors import InputError
from helpers.encoding import QUESTION, both, build, chat_text, encode_prompt, encode_text, make_rows, texts_of
from helpers.tokenizer_families import chat


@pytest.mark.parametrize(
    ("prompt", "completion", "limits", "expected"),
    [
        ([1, 2, 3], [4, 5], (None, None, 0), ([1, 2, 3], [4, 5], False)),
        ([1, 2, 3], [4, 5], (5, 3, 0), ([1, 2, 3], [4, 5], False)),
        ([1, 2, 3], [4, 5], (None, 2, 0), ([2, 3], [4, 5], True)),  # the prompt keeps its end
        ([1, 2, 3], [4, 5], (None, 2, 1), ([1, 3], [4, 5], True)),  # and its BOS
        ([1, 2, 3], [4, 5], (None, 1, 1), ([3], [4, 5], True)),  # unless nothing else would be left
        ([1, 2, 3], [4, 5, 6], (4, None, 0), ([1, 2, 3], [4], True)),  # the completion keeps its beginning
        ([1, 2, 3], [4, 5, 6], (2, None, 0), ([3], [4], True)),  # and one token always
        ([1, 2, 3], [4, 5, 6], (4, 2, 0), ([2, 3], [4, 5], True)),
        ([1, 2, 3], [4], (3, 8, 0), ([2, 3], [4], True)),
    ],
)
def test_truncate(prompt, completion, limits, expected):
    length, prompt_length, bos = limits
    assert truncate(prompt, completion, Limits(length, prompt_length), bos) == expected


def test_truncate_refuses_a_length_without_room_for_both():
    with pytest.raises(InputError, match="max_length 1"):
        truncate([1], [2], Limits(1))


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1),
    completion=st.lists(st.integers(0, 9), min_size=1),
    max_length=st.none() | st.integers(2, 20),
    max_prompt_length=st.none() | st.integers(1, 20),
    bos=st.integers(0, 2),
)
def test_truncate_never_exceeds_and_never_empties(prompt, completion, max_length, max_prompt_length, bos):
    limits = Limits(max_length, max_prompt_length)
    p, c, cut = truncate(prompt, completion, limits, bos)
    assert p and c and p[-1] == prompt[-1] and c == completion[: len(c)]
    assert len(p) <= (max_prompt_length or len(p)) and len(p) + len(c) <= (max_length or 10**9)
    assert cut == ((p, c) != (prompt, completion))
    assert truncate(prompt, [0], limits, bos)[0] == p  # whatever the completion


# --- examples ---


def examples_of(*rows, tokenizer=None, max_length=None, max_prompt_length=None, **kwargs):
    codec = Codec(tokenizer or build("bpe"))
    return encode_examples(make_rows(*rows), codec, Limits(max_length, max_prompt_length), **kwargs)


def test_examples_of_each_form_keep_their_order():
    tokenizer = build("chat")
    prompt_ids, completion_ids = both(tokenizer, "The film was", " great", finished=True)
    messages = [*QUESTION, {"role": "assistant", "content": "very good"}]
    chat_prompt, chat_answer = both(tokenizer, QUESTION, "very good", finished=True)
    examples, counts = examples_of(
        {"prompt": "The film was", "completion": " great"},
        {"text": "The film was great"},
        {"messages": messages},
        {"text": "The film was great", "finish": "length"},
        tokenizer=tokenizer,
    )
    text = encode_text(tokenizer, "The film was great")
    assert examples == [
        Example(prompt_ids + completion_ids, len(prompt_ids)),
        Example(text, 1),
        Example(chat_prompt + chat_answer, len(chat_prompt)),
        Example(text[:-1], 1),
    ]
    assert counts["rows"] == counts["examples"] == 4 and counts["truncated"] == 0


def test_overlong_texts_are_cut_dropped_or_split():
    ids = encode_text(build("bpe"), "abcdefghij")
    n = len(ids)
    long, short = {"text": "abcdefghij"}, {"text": "a"}
    cut, counts = examples_of(long, short, max_length=4)
    assert cut[0] == Example(ids[:4], 1) and counts["truncated"] == 1
    left, counts = examples_of(long, short, max_length=4, overlong="drop")
    assert len(left) == 1 and counts["dropped"] == 1
    windows, counts = examples_of(long, max_length=4, overlong="split")
    assert counts["split"] == 1 and all(2 <= len(window.ids) <= 4 for window in windows)
    predicted = [token for window in windows for token in window.ids[window.start :]]
    assert predicted == ids[1:] and n > 4  # every token once
    exact, counts = examples_of(long, max_length=n, overlong="split")
    assert exact == [Example(ids, 1)] and counts["split"] == 0


def test_overlong_answers():
    row = {"prompt": "The film was", "completion": " great and the acting was unbelievable"}
    prompt_ids, ids = both(build("bpe"), row["prompt"], row["completion"], finished=True)
    room = len(prompt_ids) + 2
    examples, counts = examples_of(row, max_length=room)
    assert examples == [Example(prompt_ids + ids[:2], len(prompt_ids))] and counts["truncated"] == 1
    with pytest.raises(InputError, match="no examples are left to train on .1 dropped"):
        examples_of(row, max_length=room, overlong="drop")
    with pytest.raises(InputError, match="data.jsonl:1: .* too many, and only a text without a prompt can be split"):
        examples_of(row, max_length=room, overlong="split")


def test_texts_without_a_token_to_predict_are_dropped():
    examples, counts = examples_of({"text": "a", "finish": "length"}, {"text": "a"})
    assert len(examples) == 1 and counts["too_short"] == 1
    # Blanks are no tokens to WordPiece: a cut answer of blanks has nothing to predict.
    rows = ({"prompt": "a", "completion": " ", "finish": "length"}, {"prompt": "a", "completion": "b"})
    examples, counts = examples_of(*rows, tokenizer=build("wordpiece"))
    assert len(examples) == 1 and counts["too_short"] == 1


def test_preferred_ft_trains_on_the_chosen_completion():
    tokenizer = build("bpe")
    row = {"prompt": "The film was", "chosen": " great", "rejected": " dull", "chosen_finish": "length"}
    prompt_ids, chosen = both(tokenizer, "The film was", " great")
    rejected = both(tokenizer, "The film was", " dull", finished=True)[1]
    assert examples_of(row, field="chosen")[0] == [Example(prompt_ids + chosen, len(prompt_ids))]
    assert examples_of(row, field="rejected")[0] == [Example(prompt_ids + rejected, len(prompt_ids))]
    with pytest.raises(InputError, match="data.jsonl:1: field 'completion'") as error:
        examples_of(row)
    assert "--field chosen" in error.value.hint
    with pytest.raises(InputError, match="data.jsonl:1: field 'prompt': expected text"):
        examples_of({"text": "a"}, field="chosen")


def test_special_strings_are_counted_and_reported(capsys):
    _, counts = examples_of({"text": "a<|endoftext|>b"}, {"text": "a<|endoftext|>"}, {"prompt": "a", "completion": "b"})
    assert counts["special_text"] == 1
    assert "1 rows spell a special token" in " ".join(capsys.readouterr().err.split())


# --- pairs ---


def pairs_of(*rows, tokenizer=None, max_length=None, max_prompt_length=None):
    codec = Codec(tokenizer or build("bpe"))
    return encode_pairs(make_rows(*rows), codec, Limits(max_length, max_prompt_length))


def test_pairs_share_prompts_and_completions():
    tokenizer = build("bpe")
    data = pairs_of(
        {"prompt": "p", "chosen": " a", "rejected": " b", "margin": 2},
        {"prompt": "p", "chosen": " a", "rejected": " c"},
        {"prompt": "q", "chosen": " b", "rejected": " a", "margin": None},
        {"prompt": "p", "chosen": " c", "rejected": " b"},
    )
    p, q = encode_prompt(tokenizer, "p"), encode_prompt(tokenizer, "q")
    a, b, c = (both(tokenizer, "p", text, finished=True)[1] for text in (" a", " b", " c"))
    assert data.prompts == [p, q]
    assert data.completions == [a, b, c, b, a]  # of p: a, b, c; of q: b, a
    assert data.prompt_of == [0, 0, 0, 1, 1]
    assert data.pairs == [(0, 1), (0, 2), (3, 4), (2, 1)]
    assert data.lines == [1, 2, 3, 4]
    assert data.margins == [2.0, None, None, None]
    assert data.counts["rows"] == data.counts["pairs"] == 4


def test_a_cut_completion_is_another_one_than_a_finished_one():
    data = pairs_of({"prompt": "p", "chosen": " a", "rejected": " a", "rejected_finish": "length"})
    assert data.completions[0] == data.completions[1] + [build("bpe").eos_token_id]


def test_pairs_equal_after_truncation_are_dropped_with_what_only_they_held():
    tokenizer = build("bpe")
    rows = (
        {"prompt": "p", "chosen": " a", "rejected": " a"},
        {"prompt": "q", "chosen": "xyz", "rejected": "xyw"},
        {"prompt": "r", "chosen": " a", "rejected": " b"},
    )
    data = pairs_of(*rows, max_length=3)
    assert data.counts["equal_dropped"] == 2 and data.lines == [3]
    assert data.prompts == [encode_prompt(tokenizer, "r")] and len(data.completions) == 2
    with pytest.raises(InputError, match=r"data.jsonl: no pairs are left to train on \(2 equal_dropped\)"):
        pairs_of(*rows[:2], max_length=3)


def test_pairs_count_truncation_and_empties():
    rows = [
        {"prompt": "p", "chosen": " ", "rejected": "b", "chosen_finish": "length"},
        {"prompt": "p", "chosen": "a", "rejected": "b a b a b a"},
    ]
    data = pairs_of(*rows, tokenizer=build("wordpiece"), max_length=4)
    assert data.counts["empty_dropped"] == 1 and data.counts["truncated"] == 1
    assert [len(ids) for ids in data.completions] == [2, 2]


def test_stored_ids_are_used_where_the_tokenizer_is_the_same():
    tokenizer = build("bpe")
    eos = tokenizer.eos_token_id
    h, e, llo = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("h", "e", "llo"))
    sampled = h + e + llo  # not how the tokenizer would write "hello"
    assert sampled != tokenizer("hello", add_special_tokens=False)["input_ids"]
    row = {
        "prompt": "say: ",
        "chosen": "hello",
        "rejected": "no",
        "chosen_ids": sampled,
        "rejected_ids": [*tokenizer("no", add_special_tokens=False)["input_ids"], eos],
        "prompt_ids": [7, 8],
        "chosen_finish": "length",
        "rejected_finish": "stop",
        "tokenizer": fingerprint(tokenizer),
    }
    row["texts"] = texts_of(row)
    data = pairs_of(row)
    assert data.prompts == [[7, 8]] and data.completions == [sampled, row["rejected_ids"]]  # no second EOS
    assert data.counts["from_ids"] == 1
    assert pairs_of({**row, "chosen_finish": "stop"}).completions[0] == sampled + [eos]
    other = pairs_of({**row, "tokenizer": "0" * 16})
    assert other.prompts == [encode_prompt(tokenizer, "say: ")] and other.counts["from_ids"] == 0
    assert other.completions[0] == both(tokenizer, "say: ", "hello")[1]
    sample = {"prompt": "p", "completion": "hello", "prompt_ids": [7], "completion_ids": [*sampled, eos]}
    sample |= {"tokenizer": fingerprint(tokenizer), "texts": texts_of(sample)}
    examples, counts = examples_of(sample)
    assert examples == [Example([7, *sampled, eos], 1)] and counts["from_ids"] == 1


def test_stored_ids_hold_only_for_the_texts_that_they_were_made_for(capsys):
    tokenizer = build("bpe")
    row = {"prompt": "say: ", "chosen": "hello", "rejected": "no"}
    row |= {"prompt_ids": [7, 8], "chosen_ids": [300, 0], "rejected_ids": [301, 0], "tokenizer": fingerprint(tokenizer)}
    row["texts"] = texts_of(row)
    assert pairs_of(row).completions == [[300, 0], [301, 0]]
    assert "were not made for their texts" not in capsys.readouterr().err

    written = both(tokenizer, "say: ", "hello", finished=True)[1], both(tokenizer, "say: ", "no", finished=True)[1]
    flipped = row | {"chosen": "no", "rejected": "hello"}
    data = pairs_of(row | {"prompt": "say: !"}, flipped | {"texts": []})
    prompt = encode_prompt(tokenizer, "say: ")
    assert data.prompts == [encode_prompt(tokenizer, "say: !"), prompt]
    assert [tuple(data.completions[c] for c in pair) for pair in data.pairs] == [written, written[::-1]]
    assert data.counts["from_ids"] == 0 and data.counts["ids_not_used"] == 2
    assert "2 rows have token ids that were not made for their texts" in " ".join(capsys.readouterr().err.split())

    cleaned = pairs_of(row | {"chosen": "hello!"})  # one text was edited: the other one's ids hold
    assert cleaned.counts["ids_not_used"] == 1 and [301, 0] in cleaned.completions
    assert both(tokenizer, "say: ", "hello!", finished=True)[1] in cleaned.completions


def test_exchanged_texts_take_their_ids_and_their_ends_along(capsys):
    """As they were sampled, which is not how the tokenizer writes them; one of them was cut."""
    tokenizer = build("bpe")
    row = {"prompt": "say: ", "chosen": "hello", "rejected": "no", "chosen_finish": "length", "rejected_finish": "stop"}
    row |= {"prompt_ids": [7, 8], "chosen_ids": [300], "rejected_ids": [301, 0], "tokenizer": fingerprint(tokenizer)}
    row["texts"] = texts_of(row)
    data = pairs_of(row, row | {"chosen": "no", "rejected": "hello"})
    assert data.prompts == [[7, 8]] and data.completions == [[300], [301, 0]] and data.pairs == [(0, 1), (1, 0)]
    assert data.counts["from_ids"] == 2 and data.counts["ids_not_used"] == 0
    assert "1 rows have the texts of chosen and rejected exchanged" in " ".join(capsys.readouterr().err.split())


def test_the_completions_of_a_row_share_its_prompt_where_one_was_edited():
    """The prompt's ids may be those of a prompt that was cut."""
    tokenizer = build("bpe")
    row = {"prompt": "say: ", "chosen": "hello", "rejected": "no"}
    row |= {"prompt_ids": [7, 8], "chosen_ids": [300, 0], "rejected_ids": [301, 0], "tokenizer": fingerprint(tokenizer)}
    row["texts"] = texts_of(row)
    assert pairs_of(row | {"chosen": "hello!"}).prompts == [[7, 8]]
    both_edited = pairs_of(row | {"chosen": "hello!", "rejected": "no!"})
    assert both_edited.prompts == [encode_prompt(tokenizer, "say: ")]


def test_a_chat_without_bos_keeps_no_token_in_its_place():
    tokenizer = chat()
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")  # it still adds one to texts
    row = {"prompt": QUESTION, "chosen": "a", "rejected": "b"}
    whole = encode_prompt(tokenizer, QUESTION)
    assert whole[0] != tokenizer.bos_token_id
    assert encode_pairs(make_rows(row), Codec(tokenizer), Limits(99, 8)).prompts == [whole[-8:]]


def test_answers_that_follow_each_other_are_all_trained():
    tokenizer = build("chat")
    messages = [*QUESTION, *({"role": "assistant", "content": text} for text in ("good", "very good"))]
    [example], counts = encode_examples(make_rows({"messages": messages}), Codec(tokenizer), Limits())
    head = tokenizer("\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert example.ids == tokenizer.apply_chat_template(messages, return_dict=False)[:-1]
    [(begin, end)] = example.gaps
    assert example.ids[begin:end] == head and example.start == len(encode_prompt(tokenizer, QUESTION))
    assert counts["trained_tokens"] == len(example.ids) - example.start - len(head)


def test_a_token_id_is_one_object_however_often_it_is_held():
    tokenizer = build("bpe")
    stored = {"prompt_ids": [300, 301], "chosen_ids": [400], "tokenizer": fingerprint(tokenizer)}
    rows = [{"prompt": "The film was", "chosen": " great", "rejected": f" great {n}"} for n in range(3)]
    with_ids = [row | stored | {"rejected_ids": [400, 410 + n]} for n, row in enumerate(rows)]
    rows += [json.loads(json.dumps(row | {"texts": texts_of(row)})) for row in with_ids]
    data = pairs_of(*rows)
    held = [i for ids in data.prompts + data.completions for i in ids]
    assert {300, 400, tokenizer("The")["input_ids"][0]} < set(held) and max(held) > 256  # Python shares those up to 256
    assert len({id(i) for i in held}) == len(set(held)) < len(held)


def test_a_sample_that_ended_at_once_is_its_eos():
    data = pairs_of({"prompt": "p", "chosen": "", "rejected": " b", "chosen_finish": "stop"})
    assert data.completions[0] == [build("bpe").eos_token_id]


def test_chat_pairs():
    tokenizer = build("chat")
    data = pairs_of({"prompt": QUESTION, "chosen": "yes", "rejected": "no"}, tokenizer=tokenizer)
    assert data.prompts == [encode_prompt(tokenizer, QUESTION)]
    assert [chat_text(tokenizer, ids) for ids in data.completions] == ["yes<|im_end|>", "no<|im_end|>"]


def test_truncated_prompts_keep_the_bos():
    tokenizer = build("unigram-first")
    row = {"prompt": "The film was great", "chosen": " a", "rejected": " b"}
    whole = encode_prompt(tokenizer, row["prompt"])
    assert pairs_of(row, tokenizer=tokenizer, max_prompt_length=3).prompts == [[tokenizer.bos_token_id, *whole[-2:]]]
