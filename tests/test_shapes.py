"""Rows of the shapes and formats that people have: the same rows as written by hand, and clear refusals."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys

import datasets
import pytest

from dpoctl.data.codec import Codec
from dpoctl.data.columns import parse_columns
from dpoctl.data.encode import Limits, encode_examples, encode_pairs
from dpoctl.data.readers import load_rows
from dpoctl.errors import InputError
from helpers.row_shapes import CHATS, FORMATS, PREFERENCES, TEXTS, TOOL, assistant, system, user, write
from helpers.tokenizer_families import chat


def only(rows, *names):
    return [{name: row[name] for name in names if row.get(name) is not None} for row in rows]


PAIR = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", PREFERENCES)
def test_preferences_of_a_shape_are_those_written_by_hand(tmp_path, shape, form):
    theirs, by_hand = PREFERENCES[shape]
    rows = load_rows(write(tmp_path, theirs, form), "preferences")
    assert only(rows.rows, *PAIR) == by_hand
    (tmp_path / "hand.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_hand))
    codec, limits = Codec(chat()), Limits(200, 100)
    one = encode_pairs(rows, codec, limits)
    other = encode_pairs(load_rows(tmp_path / "hand.jsonl", "preferences"), codec, limits)
    assert (one.prompts, one.completions, one.pairs) == (other.prompts, other.completions, other.pairs)
    # as prompts they are split in the same way
    prompts = load_rows(rows.path, "prompts")
    assert [row["prompt"] for row in prompts.rows] == [row["prompt"] for row in by_hand]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", CHATS)
def test_chats_of_a_shape_are_those_written_by_hand(tmp_path, shape, form):
    theirs, by_hand = CHATS[shape]
    rows = load_rows(write(tmp_path, theirs, form), "text")
    assert only(rows.rows, "prompt", "completion", "messages", "tools") == by_hand
    (tmp_path / "hand.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_hand))
    codec, limits = Codec(chat()), Limits(200, 100)
    one, _ = encode_examples(rows, codec, limits)
    assert one == encode_examples(load_rows(tmp_path / "hand.jsonl", "text"), codec, limits)[0]


def test_csv_holds_the_same_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected,margin,label\n"a, ""b""\nc", d,e ,0.5,x\nf,g,h,,\n')
    rows = load_rows(path, "preferences")
    assert only(rows.rows, *PAIR, "margin", "label") == [
        {"prompt": 'a, "b"\nc', "chosen": " d", "rejected": "e ", "margin": 0.5, "label": "x"},
        {"prompt": "f", "chosen": "g", "rejected": "h"},
    ]
    assert rows.lines == [2, 4]
    (tmp_path / "b.tsv").write_text("prompt\tsystem\na,b\t\nc\tS\n")
    prompts = [row["prompt"] for row in load_rows(tmp_path / "b.tsv", "prompts").rows]
    assert prompts == [[user("a,b")], [*system("S"), user("c")]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", 'prompt,chosen,rejected\n"a,b,c\n', "a.csv:2: broken CSV"),
        ("a.csv", "prompt,chosen,rejected\na,b\n", "a.csv:2: 2 cells in a table of 3 columns"),
        ("a.csv", "prompt,prompt\na,b\n", "two columns are named 'prompt'"),
        ("a.csv", "prompt,chosen,rejected\n\"[{'role': 'user', 'content': 'a'}]\",b,c\n", "written as Python text"),
        ("a.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("a.json", '[{"prompt": "a", "chosen": "b", "rejected": "c"}', "a.json:1: broken JSON: expected ','"),
        ("a.json", '[\n{"prompt": "a",}]', "a.json:2: broken JSON"),
        ("a.json", "[]", "the file holds no rows"),
        ("a.json", '[{"prompt": "a"},\n1]', "a.json:1: field 'chosen'"),
        ("a.json", '{\n"prompt": "a"', "a.json:1: broken JSON"),
        ("a.json", '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', "2 lists of rows: 'train', 'test'"),
        ("a.csv", b"prompt,chosen\na,b\n\xff,c\n", "a.csv:3: not UTF-8"),
        ("a.jsonl", "prompt,chosen\na,b\n", "a.jsonl:1: broken JSON"),
        ("a.jsonl", bz2.compress(b"{}"), "a.jsonl: compressed with bzip2"),
        ("a.jsonl.xz", lzma.compress(b"{}"), "compressed with xz"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "compressed twice"),
        ("a.csv", b"PK\x03\x04", "a zip archive or a workbook"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("a.parquet", "PAR1", "a.parquet: cannot be read"),
        ("a.parquet", "", "a.parquet: cannot be read"),
        ("a.arrow", "ARROW1", "a.arrow: cannot be read"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd123", "broken zstd data"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        load_rows(path, "preferences")
    assert said in error.value.message and error.value.hint


def test_directories_are_saved_data_sets_of_one_split(tmp_path):
    data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match="holds 2 splits") as error:
        load_rows(tmp_path / "both", "text")
    assert str(tmp_path / "both" / "train") in error.value.hint
    assert [row["text"] for row in load_rows(tmp_path / "both" / "test", "text").rows] == ["b"]
    assert [row["text"] for row in load_rows(tmp_path / "one", "text").rows] == ["a", "b"]
    with pytest.raises(InputError, match="a directory, expected a file of rows"):
        load_rows(tmp_path, "text")
    next((tmp_path / "one" / "train").glob("*.arrow")).unlink()
    with pytest.raises(InputError, match="is missing"):
        load_rows(tmp_path / "one", "text")


def test_hub_data_sets_are_named_with_config_and_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, text in (("train", "a"), ("test", "b")):
        (tmp_path / "repo" / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([{"text": text}]).to_parquet(tmp_path / "repo" / "data" / f"{split}-0.parquet")
    assert [row["text"] for row in load_rows("hub:repo:test", "text").rows] == ["b"]
    assert [row["text"] for row in load_rows("hub:repo:default:train", "text").rows] == ["a"]
    with pytest.raises(InputError, match="has 2 splits") as error:
        load_rows("hub:repo", "text")
    assert "hub:repo:train" in error.value.hint
    for name in ("hub:repo:nix", "hub:", "hub:repo:a:b:c", "hub:repo@:train", "hub:no/such"):
        with pytest.raises(InputError) as error:
            load_rows(name, "text")
        assert error.value.hint


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"query": "a", "winner": "b", "loser": "c"}, "--columns prompt=query,chosen=winner,rejected=loser"),
        ({"post": "a", "chosen": "b", "rejected": "c"}, "--columns prompt=post"),
        ({"question": "a", "instruction": "b", "chosen": "c", "rejected": "d"}, "--columns prompt=instruction"),
        ({"foo": "a", "chosen": "b", "rejected": "c"}, "'foo'"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "b"}, "images"),
    ],
)
def test_what_does_not_map_is_refused_with_the_columns_that_mend_it(tmp_path, row, hint):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError) as error:
        load_rows(path, "preferences")
    assert hint in error.value.hint
    if "--columns" in hint and "instruction" not in hint:
        mended = load_rows(path, "preferences", columns=error.value.hint.removeprefix("--columns "))
        assert only(mended.rows, "prompt", "chosen", "rejected") == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def test_columns_that_may_belong_to_the_prompt_are_told_once(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [{"context": "C", "prompt": q, "chosen": a, "rejected": b, "n": 1} for q, a, b in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_rows(path, "preferences")
    said = capsys.readouterr().err
    assert said.count("column 'context' is not used") == 1 and "--columns prompt=context+prompt" in said
    joined = load_rows(path, "preferences", columns="prompt=context+prompt")
    assert joined.rows[0]["prompt"] == f"C\n{TEXTS[0][0]}" and "context" not in joined.rows[0]
    assert "not used" not in capsys.readouterr().err
    path.write_text(json.dumps({"system": "S", "question": "q", "chosen": "a", "rejected": "b"}))
    load_rows(path, "preferences")
    assert f"{path}: system, question -> prompt (messages)" in " ".join(capsys.readouterr().err.split())


def test_numbers_and_labels_of_a_table_are_no_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,chosen_share,votes,weight\np,a,b,0.75,4,2\n")
    [row] = load_rows(path, "preferences").rows
    assert (row["chosen_share"], row["votes"], row["weight"]) == (0.75, 4, 2)
    path.write_text("prompt,chosen,rejected,agreed\np,a,b,0.75\n")
    [row] = load_rows(path, "preferences", columns="chosen_share=agreed").rows
    assert row["chosen_share"] == 0.75
    path.write_text("question,answer,thumb\np,a,TRUE\np,b,false\np,c,0.5\n")
    rows = load_rows(path, "unpaired", columns="prompt=question,completion=answer,label=thumb").rows
    assert [row["label"] for row in rows] == [True, False, 0.5]
    path.write_text("prompt,one,other,winner\np,x,y,b\n")
    [row] = load_rows(path, "known", columns="a=one,b=other,preferred=winner").rows
    assert (row["a"], row["b"], row["preferred"]) == ("x", "y", "b")


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=a", "prompt=a,prompt=b", "promt=a", "prompt=a,,", ","])
def test_columns_of_another_notation_are_refused(text):
    with pytest.raises(InputError, match="--columns") as error:
        parse_columns(text)
    assert error.value.hint


def test_a_json_object_names_columns_of_any_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"title, long",a+b,good=1,rejected\nT,P,c,d\n')
    columns = '{"prompt": ["title, long", "a+b"], "chosen": "good=1"}'
    assert parse_columns(columns) == {"prompt": ("title, long", "a+b"), "chosen": ("good=1",)}
    rows = load_rows(path, "preferences", columns=columns).rows
    assert only(rows, "prompt", "chosen", "rejected") == [{"prompt": "T\nP", "chosen": "c", "rejected": "d"}]
    path.write_text('"my, query",chosen,rejected\na,b,c\n')
    with pytest.raises(InputError) as error:
        load_rows(path, "preferences", columns='{"prompt": "my,query"}')
    assert "'my, query'" in error.value.hint


@pytest.mark.parametrize(
    ("row", "columns"),
    [({"prompt,1": "a", "chosen": "b", "rejected": "c"}, {"prompt": "prompt,1"})],
)
def test_the_hint_quotes_columns_of_any_name(tmp_path, row, columns):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError) as error:
        load_rows(path, "preferences")
    assert error.value.hint == f"--columns '{json.dumps(columns)}'"
    assert load_rows(path, "preferences", columns=json.dumps(columns)).rows[0]["prompt"] == "a"


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a"',
        '{"promt": "a"}',
        '{"prompt": []}',
        '{"prompt": 5}',
        '{"prompt": ""}',
        "{}",
        '{"k": "a", "k": "b"}',
    ],
)
def test_broken_json_of_columns_is_refused(text):
    with pytest.raises(InputError, match="--columns") as error:
        parse_columns(text)
    assert error.value.hint


def test_columns_that_a_file_lacks_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a"}')
    with pytest.raises(InputError, match="there is no column 'qestion'") as error:
        load_rows(path, "prompts", columns="prompt=qestion")
    assert error.value.hint == "did you mean 'question'?"
    path.write_text('{"chosen": "a", "rejected": "b", "prompt": "p"}')
    rows = load_rows(path, "preferences", columns="chosen=rejected,rejected=chosen")
    assert (rows.rows[0]["chosen"], rows.rows[0]["rejected"]) == ("b", "a")


def test_equal_prompts_are_one_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "a", "chosen": "z", "rejected": "y"},
        {"prompt": "b", "chosen": "x", "rejected": "y"},
        {"prompt_id": "k", "prompt": "b", "chosen": "x", "rejected": "y", "chosen_ids": [1], "tokenizer": "t"},
        {"prompt_id": "k", "prompt": "b", "chosen": "z", "rejected": "y"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_rows(path, "prompts")
    assert [(row["prompt_id"], row["prompt"]) for row in prompts.rows] == [("0", "a"), ("2", "b"), ("k", "b")]
    assert prompts.repeated == 2 and prompts.lines == [1, 3, 4]
    assert "chosen_ids" not in prompts.rows[2]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt_id": "k", "prompt": "c"}]))
    with pytest.raises(InputError, match="6: field 'prompt_id': expected one prompt for each"):
        load_rows(path, "prompts")


def test_a_dialogue_is_a_prompt_up_to_where_it_is_to_be_answered(tmp_path):
    path = tmp_path / "a.jsonl"
    for name in ("messages", "conversations"):
        path.write_text(json.dumps({name: [user("a")]}))
        assert load_rows(path, "prompts").rows[0]["prompt"] == [user("a")]
        path.write_text(json.dumps({name: [user("a"), assistant("b")]}))
        with pytest.raises(InputError, match=f"field '{name}': expected a last message that is to be answered"):
            load_rows(path, "prompts")


def test_a_call_of_a_tool_has_no_text(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    messages = [user("a"), call, {"role": "tool", "name": "look", "content": "b"}, assistant("c")]
    path = write(tmp_path, [{"messages": messages, "tools": [TOOL]}] * 2, "parquet")
    assert load_rows(path, "text").rows[0]["messages"] == messages
    row = {"prompt": [user("a")], "chosen": [call], "rejected": [assistant("b")], "tools": [TOOL]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load_rows(tmp_path / "a.jsonl", "preferences").rows == [row]


def test_a_pipe_is_read_as_often_as_needed(tmp_path):
    script = (
        "from dpoctl.data.readers import load_rows; import sys; p = sys.argv[1]; "
        "print([row['text'] for _ in 'ab' for row in load_rows(p, 'text').rows])"
    )
    line = ["bash", "-c", '"$0" -c "$1" <(printf \'{"text": "a"}\\n\' | gzip)', sys.executable, script]
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.stdout.strip() == "['a', 'a']", found.stderr
    refused = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": "2"})
    assert "a pipe can be read by one process only" in refused.stderr
