"""Rows from JSONL files: what is read, what is refused and in which words."""

import gzip
import json

import pytest

from dpoctl.data.jsonl import read_jsonl
from dpoctl.data.readers import load_rows
from dpoctl.data.schema import shape_of
from dpoctl.errors import InputError

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
MINIMAL = {
    "text": {"text": "a film"},
    "prompts": {"prompt": "a"},
    "completions": {"prompt": "a", "completion": "b"},
    "preferences": PAIR,
    "evaluations": {"model": "runs/dpo", "reward": 0.9},
}


@pytest.fixture
def load(tmp_path):
    """Write rows (objects, or lines as they are) to data.jsonl and load them."""

    def load(kind, *rows, **kwargs):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return load_rows(path, kind, **kwargs)

    return load


@pytest.fixture
def refused(load):
    """The message (after the file's name) and hint of the InputError that the last of these rows gives."""

    def refused(kind, *rows):
        with pytest.raises(InputError) as error:
            load(kind, *rows)
        return error.value.message.partition("data.jsonl:")[2], error.value.hint

    return refused


# --- files ---


@pytest.mark.parametrize("kind", MINIMAL)
def test_a_minimal_row_of_each_kind_with_extra_fields(load, kind):
    row = {**MINIMAL[kind], "source": {"url": "x"}, "label": None}
    rows = load(kind, row)
    assert row.items() <= rows.rows[0].items()
    assert rows.lines == [1] and rows.skipped == {} and rows.path.endswith("data.jsonl")


def test_bom_crlf_blank_lines_and_odd_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "é"}\r\n\r\n   \n{"text": "a\u2028b\x85"}'.encode())
    assert list(read_jsonl(path)) == [(1, {"text": "é"}), (4, {"text": "a\u2028b\x85"})]
    rows = load_rows(path, "text")
    assert rows.lines == [1, 4]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl"])
def test_gzip_is_known_by_its_content(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert [row["text"] for _, row in read_jsonl(tmp_path / name)] == ["a", "b"]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_cut_gzip_file_is_refused(tmp_path, skip_bad):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "review %d"}\n' % n for n in range(1000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="a.jsonl.gz: broken gzip data") as error:
        load_rows(path, "text", skip_bad=skip_bad)
    assert error.value.hint
    path.write_bytes(whole[:10] + b"\xff" * 100)
    with pytest.raises(InputError, match="broken gzip data"):
        load_rows(path, "text", skip_bad=skip_bad)


def test_missing_files_are_named_with_the_nearest(tmp_path):
    (tmp_path / "prefs.train.jsonl").write_text("{}")
    with pytest.raises(InputError, match="pref.train.jsonl: no such file") as error:
        list(read_jsonl(tmp_path / "pref.train.jsonl"))
    assert error.value.hint == f"did you mean {tmp_path / 'prefs.train.jsonl'}?"
    with pytest.raises(InputError) as error:
        list(read_jsonl(tmp_path / "xyz"))
    assert error.value.hint == f"{tmp_path} holds prefs.train.jsonl"
    with pytest.raises(InputError) as error:
        list(read_jsonl(tmp_path / "nowhere" / "a.jsonl"))
    assert error.value.hint == f"there is no directory {tmp_path / 'nowhere'}"
    with pytest.raises(InputError, match="a directory, expected a file of rows"):
        list(read_jsonl(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_jsonl(tmp_path / "prefs.train.jsonl" / "a.jsonl"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match="a.jsonl: the file holds no rows"):
        load_rows(tmp_path / "a.jsonl", "text")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "broken JSON at column 13"),
        ('{"text": "a"} {"text": "b"}', "broken JSON at column 15: Extra data"),
        ('["a"]', "expected a JSON object, got a JSON array of 1"),
        ("3", "expected a JSON object, got 3"),
        ("[" * 100_000, "broken JSON: "),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "broken JSON: "),
        ('{"text": "a", "text": "b"}', "field 'text': expected once in an object, got it twice"),
        ('{"text": "a", "m": [{"x": 1, "y": 2, "x": 1}]}', "field 'x': expected once in an object, got it twice"),
        ('{"text": "a", "id": "\\ud800"}', r"field 'id': expected valid Unicode, got the lone surrogate '\ud800'"),
        ('{"text": "a", "m": [{"x": "b\\uDC00"}]}', r"field 'm[0].x': expected valid Unicode"),
        ('{"text": "a", "\\udfff": 1}', r"field '\udfff': expected valid Unicode"),
    ],
)
def test_broken_lines(load, refused, line, problem):
    good = {"text": "a"}
    message, hint = refused("text", good, line, good)
    assert message.startswith("2: ") and problem in message and hint
    rows = load("text", good, line, good, skip_bad=True)
    assert rows.lines == [1, 3] and rows.skipped == {"unreadable line": 1}


@pytest.mark.parametrize("line", [' \t{"a": 1}', '{"a": 1} \t', '{"a": NaN}', '{"a": "\\ud83d\\ude00"}'])
def test_a_line_is_read_as_json_reads_it(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line)
    [(number, row)] = read_jsonl(tmp_path / "a.jsonl")
    assert number == 1 and repr(row) == repr(json.loads(line))


def test_a_list_is_read_as_strictly_as_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": "b", "text": "c"},\n {"text": "\\udc00"},\n {"text": "d"}]')
    with pytest.raises(InputError, match="a.json:2: field 'text': expected once in an object, got it twice"):
        load_rows(path, "text")
    rows = load_rows(path, "text", skip_bad=True)
    assert [row["text"] for row in rows.rows] == ["a", "d"] and rows.skipped == {"unreadable line": 2}


def test_a_dialogue_in_a_cell_names_a_field_once(tmp_path):
    cell = '[{"role": "user", "content": "a", "content": "b"}]'.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt,chosen,rejected\n"{cell}",c,d\n')
    with pytest.raises(InputError, match="a.csv:2: field 'prompt': .* field 'content': expected once"):
        load_rows(tmp_path / "a.csv", "preferences")


def test_other_formats_are_recognised(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[\n{"text": "a"}\n]')
    with pytest.raises(InputError, match="a.jsonl:1: broken JSON") as error:
        list(read_jsonl(path))
    assert "JSON objects, one a line" in error.value.hint
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match="a.jsonl:2: not UTF-8 at byte 13 of the line") as error:
        list(read_jsonl(path))
    assert error.value.hint == "save the file as UTF-8"


# --- skipping and limits ---


def test_invalid_rows_are_skipped_only_on_request_and_counted(load, refused, capsys):
    rows = [PAIR, {"prompt": "p", "chosen": "a"}, {**PAIR, "chosen": ""}, {"prompt": "p", "chosen": "a"}, "{", PAIR]
    message, hint = refused("preferences", *rows)
    assert message == "2: field 'rejected': expected a string or a list of messages, got nothing"
    loaded = load("preferences", *rows, skip_bad=True)
    assert loaded.rows == [PAIR, PAIR] and loaded.lines == [1, 6]
    assert loaded.skipped == {
        "field 'rejected': expected a string or a list of messages": 2,
        "field 'chosen': expected text": 1,
        "unreadable line": 1,
    }
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "4 of 6 rows skipped" in said


def test_nothing_left_after_skipping_is_refused(load):
    with pytest.raises(InputError, match="none of its rows can be used; 1 x field 'text': expected"):
        load("text", {"a": 1}, skip_bad=True)


def test_limit_counts_good_rows_and_reads_no_further(load):
    assert load("text", {"text": "a"}, {"text": "b"}, "{", limit=2).lines == [1, 2]
    assert load("text", {"x": "a"}, {"text": "b"}, {"text": "c"}, limit=1, skip_bad=True).lines == [2]


# --- fields ---


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        ("text", {"text": ""}, "field 'text': expected text, got an empty string"),
        ("text", {"text": " \n"}, "field 'text': expected text, got only blanks"),
        ("text", {"text": 3}, "field 'text': expected a string or a list of messages, got 3"),
        ("text", {"text": {"a": 1}}, "field 'text': expected a string or a list of messages, got a JSON object of 1"),
        ("text", {"text": "a\ud800"}, "field 'text': expected valid Unicode, got the lone surrogate '\\ud800'"),
        ("text", {"text": "a", "finish": "eos"}, "field 'finish': expected 'stop' or 'length', got \"eos\""),
        ("text", {"prompt": "a"}, "field 'completion': expected a string or a list of messages, got nothing"),
        ("text", {"messages": "a"}, "field 'messages': expected a list of messages, got \"a\""),
        ("prompts", {"prompt": ""}, "field 'prompt': expected text, got an empty string"),
        ("prompts", {"prompt": []}, "field 'prompt': expected messages with text, got an empty list"),
        ("prompts", {"prompt": "a", "prompt_id": True}, "field 'prompt_id': expected a string or an integer, got true"),
        ("prompts", {"prompt": "a", "reference": ""}, "field 'reference': expected text, got an empty string"),
        ("prompts", {"prompt": "a", "prompt_ids": [1, -1]}, "expected a list of token ids (integers from 0), got"),
        ("prompts", {"prompt": "a", "prompt_ids": [True]}, "expected a list of token ids (integers from 0), got"),
        ("completions", {"prompt": "a", "completion": ""}, "field 'completion': expected text, got an empty string"),
        ("completions", {"prompt": "a", "completion": "b", "k": -1}, "field 'k': expected a sample number"),
        ("completions", {"prompt": "a", "completion": "b", "score": "1"}, 'expected a finite number, got "1"'),
        ("completions", '{"prompt": "a", "completion": "b", "score": NaN}', "expected a finite number, got NaN"),
        ("preferences", {**PAIR, "rejected": None}, "field 'rejected': expected a string or a list of messages"),
        ("preferences", {**PAIR, "prompt": ""}, "field 'prompt': expected text, got an empty string"),
        ("preferences", {**PAIR, "chosen_finish": "EOS"}, "field 'chosen_finish': expected 'stop' or 'length'"),
        ("preferences", {**PAIR, "margin": True}, "field 'margin': expected a finite number, got true"),
        ("preferences", {**PAIR, "rejected_ids": "1 2"}, "field 'rejected_ids': expected a list of token ids"),
        ("evaluations", {"reward": 1}, "field 'model': expected a string, got nothing"),
        ("evaluations", {"model": "a", "kl": "high"}, "field 'kl': expected a finite number, got \"high\""),
        ("evaluations", {"model": "a", "options": []}, None),
        ("evaluations", {"model": "a", "options": [1]}, "field 'options': expected an object"),
    ],
)
def test_wrong_fields_are_named_with_what_was_expected(load, refused, kind, row, problem):
    if problem is None:  # an empty array is how some writers say "none"
        assert load(kind, row).lines == [1]
        return
    message, hint = refused(kind, MINIMAL[kind], row)
    assert message.startswith("2: ") and problem in message and hint


@pytest.mark.parametrize(
    ("kind", "row", "hint"),
    [
        ("prompts", {"query": "a"}, "--columns prompt=query"),
        ("prompts", {"Prompt": "a"}, "--columns prompt=Prompt"),
        ("prompts", {"prompts": "a"}, "--columns prompt=prompts"),
        ("prompts", {"a": 1, "b": None}, "the row has 'a'"),
        ("preferences", {"prompt": "p", "chosen": "a", "reject": "b"}, "--columns rejected=reject"),
        ("completions", {"prompt": "p", "generation": "b"}, "--columns completion=generation"),
        ("text", {"review": "a"}, "--columns text=review"),
        ("text", {"chosen": "a", "rejected": "b"}, "--field chosen"),
        ("text", {"messages": [{"speaker": "user", "content": "a"}]}, "rename 'speaker' to 'role'"),
        ("text", {"messages": [{"role": "human", "content": "a"}]}, "did you mean 'user'?"),
        ("text", {"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ("preferences", {"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, "'prompt', 'chosen', 'rejected'"),
    ],
)
def test_hints_say_what_to_do(refused, kind, row, hint):
    assert hint in refused(kind, row)[1]


def test_null_counts_as_absent(load):
    row = {"text": None, "prompt": "a", "completion": "b", "messages": None, "finish": None}
    assert shape_of(load("text", row).rows[0]) == "completion"
    row = {**PAIR, "margin": None, "chosen_ids": None, "chosen_finish": None, "prompt_id": None}
    assert load("preferences", row).rows == [row]


# --- ids and numbers of rows ---


def test_prompt_ids_are_strings_and_row_numbers_by_default(load):
    rows = load("prompts", {"prompt": "a"}, {"prompt": "b", "prompt_id": 17}, {"prompt": "c", "prompt_id": "x"})
    assert [row["prompt_id"] for row in rows.rows] == ["0", "17", "x"]
    # A skipped row keeps its number: the others' random numbers do not hang on --skip-bad-rows.
    rows = load("prompts", {"prompt": "a"}, "{", {"prompt": "b"}, skip_bad=True)
    assert [row["prompt_id"] for row in rows.rows] == ["0", "2"]


def test_a_prompt_id_occurs_once_in_a_prompts_file(refused):
    message, _ = refused("prompts", {"prompt": "a", "prompt_id": "1"}, {"prompt": "b"})
    assert message == "2: field 'prompt_id': expected one prompt for each, got another one for '1'"


def test_sample_numbers_of_completions(load, refused):
    a = {"prompt_id": "a", "prompt": "a", "completion": "x"}
    b = {"prompt_id": "b", "prompt": "b", "completion": "x"}
    assert [row["k"] for row in load("completions", a, b, a, {**b, "k": 5}).rows] == [0, 0, 1, 5]
    assert "one row for each prompt_id and k" in refused("completions", {**a, "k": 1}, {**a, "k": 1})[0]
    message, _ = refused("completions", a, {**a, "prompt": "c", "k": 1})
    assert message == "2: field 'prompt': expected one prompt for each prompt_id, got another one for 'a'"


def test_an_empty_sample_is_a_sample(load):
    rows = load("completions", {"prompt": "a", "completion": "", "finish": "stop"})
    assert rows.rows[0]["completion"] == ""
    row = {**PAIR, "rejected": "", "rejected_finish": "stop"}
    assert load("preferences", row).rows == [row]


# --- messages and dialogues ---

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go away"}


def test_messages_in_every_field(load):
    assert load("text", {"text": [USER, ANSWER], "n": 1}).rows == [{"messages": [USER, ANSWER], "n": 1}]
    assert load("text", {"messages": [USER, ANSWER]}).rows == [{"messages": [USER, ANSWER]}]
    assert load("prompts", {"prompt": [USER]}).rows[0]["prompt"] == [USER]
    for completion in ("hello", [ANSWER]):
        assert load("completions", {"prompt": [USER], "completion": completion}).rows[0]["completion"] == completion
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
    assert load("preferences", row).rows == [row]


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        (
            "text",
            {"messages": [USER]},
            "field 'messages': expected a last message of the assistant, got one of role 'user'",
        ),
        ("text", {"messages": [ANSWER]}, "field 'messages': expected a message with text before the answer"),
        ("text", {"messages": [USER, {"role": "assistant", "content": ""}]}, "expected text in the last message"),
        ("text", {"messages": [USER, "a"]}, "field 'messages[1]': expected an object with 'role' and 'content'"),
        (
            "text",
            {"messages": [{"role": "user"}, ANSWER]},
            "field 'messages[0].content': expected a string, got nothing",
        ),
        ("text", {"messages": [{**USER, "content": [1]}]}, "field 'messages[0].content[0]': expected text, or a part"),
        ("text", {"messages": [{**USER, "role": "usr"}]}, "field 'messages[0].role': expected one of system, "),
        ("completions", {"prompt": "a", "completion": [USER, ANSWER]}, "field 'prompt': expected a list of messages"),
        ("preferences", {"prompt": [USER], "chosen": [ANSWER], "rejected": "b"}, "the same form as 'chosen'"),
        (
            "preferences",
            {"prompt": [USER], "chosen": [], "rejected": []},
            "expected messages with text, got an empty list",
        ),
    ],
)
def test_wrong_messages(refused, kind, row, problem):
    assert problem in refused(kind, row)[0]


def test_reasons_of_skipped_messages_are_counted_together(load):
    bad = [{"messages": [USER] * n + ["x"]} for n in (1, 2)]
    assert load("text", *bad, {"text": "a"}, skip_bad=True).skipped == {
        "field 'messages[]': expected an object with 'role' and 'content'": 2
    }


def test_dialogues_as_strings_are_split_at_the_last_answer(load, refused):
    before = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: a film?\n\nAssistant:"
    row = {"chosen": before + " Alien.", "rejected": before + " No.", "n": 1}
    expected = {"prompt": before, "chosen": " Alien.", "rejected": " No.", "n": 1}
    assert load("preferences", row).rows == [expected]
    message, _ = refused("preferences", {**row, "rejected": "\n\nHuman: hi\n\nAssistant: No."})
    assert message == "1: field 'rejected': expected the same dialogue as 'chosen' up to the last answer, got another"
    message, _ = refused("preferences", {**row, "chosen": before})
    assert message == "1: field 'chosen': expected text, got an empty string"


def test_dialogues_as_messages_are_split_before_the_last_answer(load, refused):
    row = {"chosen": [USER, OTHER, USER, ANSWER], "rejected": [USER, OTHER, USER, OTHER]}
    expected = {"prompt": [USER, OTHER, USER], "chosen": [ANSWER], "rejected": [OTHER]}
    assert load("preferences", row).rows == [expected]
    # Some data sets repeat the question beside the dialogue.
    for prompt in ("hi", [USER, OTHER, USER]):
        assert load("preferences", {"prompt": prompt, **row}).rows == [expected]
    assert "expected the messages that 'chosen' begins with" in refused("preferences", {"prompt": "bye", **row})[0]
    assert "the same dialogue as 'chosen'" in refused("preferences", {**row, "rejected": [USER, OTHER]})[0]


def test_equal_pairs_are_left_to_encoding(load):
    row = {**PAIR, "rejected": PAIR["chosen"]}
    assert load("preferences", row).rows == [row]
