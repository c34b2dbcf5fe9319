"""Rows that are nearly of a known shape: nulls and numbers of tables, function calls, labels, images, documents."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpoctl.data.readers import load_rows
from dpoctl.errors import InputError
from helpers.row_shapes import assistant, pair, system, user


@pytest.fixture
def read(tmp_path, capsys):
    """(fields of each row, what was said) of rows in a file."""

    def call(rows: list[dict], kind: str = "preferences") -> tuple[list[dict], str]:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_rows(path, kind).rows, " ".join(capsys.readouterr().err.split())

    return call


def test_a_null_is_read_as_blank(read, tmp_path):
    """A system column with some nulls: all rows of the file are chats, as with CSV's empty cells."""
    rows = [{"system": s, "question": "q", "chosen": "a", "rejected": "b"} for s in (None, "", "S")]
    expected = [pair([*system(s), user("q")], "a", "b") for s in ("", "", "S")]
    assert read(rows)[0] == expected
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet", "preferences").rows == expected
    (tmp_path / "a.csv").write_text("system,question,chosen,rejected\n,q,a,b\n,q,a,b\nS,q,a,b\n")
    assert load_rows(tmp_path / "a.csv", "preferences").rows == expected
    more = [{"prompt": "q", "input": i, "completion": "a"} for i in (None, "x")]
    assert [row["prompt"] for row in read(more, "text")[0]] == [[user("q")], [user("q\nx")]]


def test_scores_written_as_text_are_numbers(read, tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": "4.5", "rejected-rating": "2"}
    assert read([row])[0] == [{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 4.5, "rejected_score": 2}]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen-rating,rejected-rating\nq,a,b,4.5,2\n")
    assert load_rows(tmp_path / "a.csv", "preferences").rows == read([row])[0]
    rows, said = read([row | {"chosen-rating": "high"}])
    assert "chosen_score" not in rows[0] and "column 'chosen-rating' is not used: \"high\" is no number" in said
    for number in (float("nan"), 10**400):
        with pytest.raises(InputError, match="'chosen_score': expected a finite number"):
            read([row | {"chosen-rating": number}])


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize("value", ['{"name": "f", "arguments": {"x": 1}}', '[{"name": "f", "arguments": {"x": 1}}]'])
def test_function_calls_of_sharegpt(read, value):
    dialogue = [("Human", "q"), ("function_call", value), ("observation", "1"), ("Assistant", "a")]
    rows, _ = read([{"conversations": [{"from": name, "value": text} for name, text in dialogue]}], "text")
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert rows[0]["messages"] == [user("q"), called, {"role": "tool", "content": "1"}, assistant("a")]
    dialogue[1] = ("function_call", "f(1)")
    with pytest.raises(InputError, match=r"'conversations\[1\].value': expected {\"name\""):
        read([{"conversations": [{"from": name, "value": text} for name, text in dialogue]}], "text")


def test_a_prompt_of_text_with_answers_of_messages(read):
    row = {"prompt": "q", "chosen": assistant("a"), "rejected": assistant("b")}
    for kind in ("preferences", "prompts"):
        rows, said = read([row], kind)
        assert rows[0]["prompt"] == [user("q")] and "prompt -> prompt (messages)" in said
    assert read([{"prompt": "q", "completion": [assistant("a")]}], "text")[0][0]["prompt"] == [user("q")]


def test_labels_are_told(read):
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}]
    assert read(rows, "text")[1].count("column 'label' is not used") == 1
    with pytest.raises(InputError, match="expected a pair of answers, got one 'completion' with a 'label'") as error:
        read(rows)
    assert "'chosen' and 'rejected'" in error.value.hint


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("text", {"text": "t", "instruction": "i", "input": ""}, "column 'instruction' is not used; the rows are read"),
        ("text", {"messages": [user("q"), assistant("a") | {"weight": 0}]}, "'weight' of messages is not used"),
        ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x"]}, "column 'images' is not"),
    ],
)
def test_what_changes_nothing_is_told(read, kind, more, said):
    assert read([more, more], kind)[1].count(said) == 1


def test_a_dialogue_that_ends_with_a_human_turn(read):
    rows = [{name: f"\n\nHuman: q\n\nAssistant: {name}\n\nHuman: ok" for name in ("chosen", "rejected")}]
    with pytest.raises(InputError, match="expected a dialogue that ends with an answer"):
        read(rows)


def test_an_object_with_a_list_of_rows(tmp_path, capsys):
    rows = [pair([user("q")], "a", "b"), pair([user("r")], "c", "d")]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps({"version": {"n": [1]}, "data": rows, "more": "]"}, indent=indent))
        found = load_rows(path, "preferences")
        assert found.rows == rows and found.lines == ([1, 1] if indent is None else [8, 28])
        assert "the rows are those of 'data'" in " ".join(capsys.readouterr().err.split())
    path.write_text(json.dumps(rows[0], indent=1))  # one row
    assert load_rows(path, "preferences").rows == rows[:1]
    path.write_text(json.dumps({"messages": [user("q"), assistant("a")]}))  # a list of a row's own
    assert load_rows(path, "text").rows[0]["messages"] == [user("q"), assistant("a")]
    path.write_bytes(b'{"prompt": \n{"prompt": "a"}\n{"prompt": "\xff"}\n')  # broken JSON Lines
    assert load_rows(path, "prompts", skip_bad=True).skipped == {"unreadable line": 2}


def test_tables_with_odd_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, ["prompt", "prompt"]), path)
    with pytest.raises(InputError, match="two columns are named 'prompt'"):
        load_rows(path, "prompts")
    pq.write_table(pa.table({"prompt": pa.array([None], pa.string()), "chosen": ["a"], "rejected": ["b"]}), path)
    with pytest.raises(InputError, match="a.parquet:1: field 'prompt': expected .*, got nothing"):
        load_rows(path, "preferences")
    (tmp_path / "a.csv").write_text("prompt, chosen, rejected\nq,a,b\n")
    assert load_rows(tmp_path / "a.csv", "preferences").rows == [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    datasets.DatasetDict().save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="without splits"):
        load_rows(tmp_path / "none", "prompts")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    with pytest.raises(InputError) as error:
        load_rows(tmp_path / "link.jsonl", "prompts")
    assert error.value.hint == "it is a link to nowhere"
