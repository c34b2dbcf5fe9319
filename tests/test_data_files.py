"""Data files as commands take them: several at once, recorded by content, and every kind of file by every command."""

import hashlib
import json
import os
import threading
import traceback

import datasets
import pytest

from dpoctl.cli.app import run
from dpoctl.data.duplicates import count_duplicates, count_shared
from dpoctl.data.readers import load_rows
from dpoctl.errors import InputError
from dpoctl.outputs.manifests import describe_input, read_manifest
from dpoctl.runtime import pipes
from dpoctl.training.held_out import names_of
from helpers.row_shapes import PREFERENCES, write
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import chat

PAIRS = [
    {"prompt": f"Is the {what} good?", "chosen": f" Yes, the {what} is lovely.", "rejected": " No, it is dull."}
    for what in ("film", "story", "music", "ending", "acting", "café")
]
FEW = "--max-steps 2 --warmup-steps 0 --batch-size 2 --max-length 64 --max-prompt-length 32 --log-every 1"
SCORER = "def f(rows):\n    return [float(len(str(row))) for row in rows]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny chat model, a scorer, and the pairs in two files."""
    made = tmp_path_factory.mktemp("files")
    tokenizer = chat()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model("llama", vocab=len(tokenizer), context=64, **ids).save_pretrained(made / "m")
    tokenizer.save_pretrained(made / "m")
    (made / "s.py").write_text(SCORER)
    for name, rows in (("all", PAIRS), ("a", PAIRS[:4]), ("b", PAIRS[4:])):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    """A function that runs a command line in a folder of its own: (exit code, what it said)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(tmp_path)
    for file in folder.iterdir():
        if file.name != "cache":
            (tmp_path / file.name).symlink_to(file)

    def call(line: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run(line.split())
        return code, " ".join(capsys.readouterr().err.split())

    return call


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("line", ["train-dpo --loss sigmoid", "train-dpo --loss kto", "train-rm", "sft --field chosen"])
def test_several_files_are_one_file_with_metrics_of_each(command, tmp_path, line):
    held_out = "--eval-data a.jsonl --eval-data b.jsonl"
    if line == "train-rm":  # refuses held-out prompts that are trained on
        (tmp_path / "t.jsonl").write_text(json.dumps(PAIRS[0] | {"prompt": "Other?"}) + "\n")
        one, two = ("--data t.jsonl --eval-data all.jsonl", f"--data t.jsonl {held_out}")
    else:
        one, two = ("--data all.jsonl --eval-data all.jsonl", f"--data a.jsonl --data b.jsonl {held_out}")
    code, said = command(f"{line} --model m {one} {FEW} --out one")
    assert code == 0, said
    code, said = command(f"{line} --model m {two} {FEW} --out two")
    assert code == 0 and "a.jsonl: 4 rows" in said and "b.jsonl: 2 rows" in said, said
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    whole, parts = metrics(tmp_path / "one")[-1], metrics(tmp_path / "two")[-1]
    names = {name.removeprefix("eval/") for name in whole if name.startswith("eval/")}
    assert names and {name for name in parts if name.startswith("eval/a/")} == {f"eval/a/{name}" for name in names}
    assert all(abs(parts[name] - value) < 1e-5 for name, value in whole.items())
    if line.startswith("train-dpo"):  # each pair counts alike
        mean = (4 * parts["eval/a/rewards/margins"] + 2 * parts["eval/b/rewards/margins"]) / 6
        assert abs(mean - whole["eval/rewards/margins"]) < 1e-6
    # the metrics of a file are those that it has alone
    alone = two.replace(held_out, "--eval-data b.jsonl")
    assert command(f"{line} --model m {alone} {FEW} --out three")[0] == 0
    by_itself = metrics(tmp_path / "three")[-1]
    assert all(abs(parts[f"eval/b/{name}"] - by_itself[f"eval/{name}"]) < 1e-5 for name in names)


def test_each_file_belongs_to_the_identity_of_a_run(command, tmp_path):
    line = f"train-dpo --model m --data a.jsonl --data b.jsonl {FEW} --out o"
    assert command(line)[0] == 0
    manifest = read_manifest(tmp_path / "o")
    assert [i["name"] for i in manifest["inputs"]].count("data") == 2
    assert (manifest["metrics"]["rows/a"], manifest["metrics"]["rows/b"]) == (4, 2)
    assert manifest["options"]["data"] == ["a.jsonl", "b.jsonl"] and manifest["options"]["eval-data"] is None
    assert "complete already" in command(line)[1]
    code, said = command(line.replace("--data b.jsonl ", ""))
    assert code == 2 and "was started with" in said
    code, said = command(line.replace("b.jsonl", "all.jsonl"))
    assert code == 2 and "different --data" in said
    code, said = command(line.replace("b.jsonl", "a.jsonl").replace("--out o", "--out p"))
    assert code == 2 and "a.jsonl: given twice" in said
    one = f"train-dpo --model m --data a.jsonl {FEW} --out one"
    assert command(one)[0] == 0
    assert read_manifest(tmp_path / "one")["options"]["data"] == "a.jsonl"


@pytest.mark.parametrize(("number", "shape"), list(enumerate(PREFERENCES)))
def test_a_shape_trains_as_the_rows_written_by_hand(command, tmp_path, number, shape):
    theirs, by_hand = PREFERENCES[shape]
    file = write(tmp_path, theirs, ("jsonl", "json", "parquet")[number % 3])
    (tmp_path / "hand.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_hand))
    for data, out in ((file, "theirs"), ("hand.jsonl", "by-hand")):
        code, said = command(f"train-dpo --model m --data {data} {FEW} --out {out}")
        assert code == 0, said
    assert metrics(tmp_path / "theirs") == metrics(tmp_path / "by-hand")
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("theirs", "by-hand")]
    assert weights[0] == weights[1]


def test_a_pipe_is_an_input_like_its_content(command, tmp_path):
    content = (tmp_path / "all.jsonl").read_bytes()

    def piped(out: str) -> tuple[int, str]:
        (tmp_path / "pipe").unlink(missing_ok=True)
        os.mkfifo(tmp_path / "pipe")
        pipes._copies.clear()  # a later process
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        writer.start()
        found = command(f"sample --model m --prompts pipe --max-new-tokens 2 --out {out}")
        writer.join()
        return found

    assert piped("o.jsonl")[0] == 0
    assert command("sample --model m --prompts all.jsonl --max-new-tokens 2 --out p.jsonl")[0] == 0
    assert (tmp_path / "o.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()
    recorded = {i["name"]: i for i in read_manifest(tmp_path / "o.jsonl")["inputs"]}
    assert recorded["prompts"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert "complete already" in piped("o.jsonl")[1]
    content += json.dumps({"prompt": "Another?"}).encode()
    code, said = piped("o.jsonl")
    assert code == 2 and "different --prompts" in said


def test_names_of_files():
    assert names_of(["x/a.jsonl.gz", "y/a.json", "b.v2.csv", "hub:org/set:test"]) == {
        "x/a.jsonl.gz": "x_a",
        "y/a.json": "y_a",
        "b.v2.csv": "b.v2",
        "hub:org/set:test": "org_set_test",
    }


def test_a_saved_data_set_is_recorded_by_its_rows(tmp_path):
    def described(name, rows):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
        return describe_input("data", str(tmp_path / name), None, tmp_path)

    one, again, other = described("a", PAIRS), described("b", PAIRS), described("c", PAIRS[:2])
    assert one["sha256"] == again["sha256"] != other["sha256"] and one["size"] > other["size"] > 0
    repo = tmp_path / "repo"
    repo.mkdir()
    datasets.Dataset.from_list(PAIRS).to_parquet(repo / "train.parquet")
    first = describe_input("data", f"hub:{repo}:train", None, tmp_path)
    assert (
        first["path"] == "hub:repo"
        and first["sha256"] != describe_input("data", f"hub:{repo}", None, tmp_path)["sha256"]
    )
    datasets.Dataset.from_list(PAIRS[:1]).to_parquet(repo / "train.parquet")
    assert describe_input("data", f"hub:{repo}:train", None, tmp_path)["sha256"] != first["sha256"]


def test_the_commit_of_a_data_set_on_the_hub_is_recorded(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from dpoctl.runtime import hub_data

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_data.commit_of.cache_clear()
    with pytest.raises(InputError, match="cannot be loaded") as error:
        describe_input("data", "hub:some/set:train", None, tmp_path)
    assert error.value.hint
    refs = tmp_path / "datasets--some--set" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("c" * 40)
    assert describe_input("data", "hub:some/set:train", None, tmp_path)["sha256"] == "c" * 40 + ":train"
    assert describe_input("data", f"hub:some/set@{'d' * 40}", None, tmp_path)["sha256"] == "d" * 40


def test_duplicates_and_shared_prompts():
    a, b, c = PAIRS[:3]
    flipped = a | {"chosen": a["rejected"], "rejected": a["chosen"]}
    equal = b | {"rejected": b["chosen"]}
    assert count_duplicates([a, b, a, flipped, equal]) == {
        "prompts": 2,
        "duplicate_rows": 1,
        "equal_pairs": 1,
        "contradictions": 1,
    }
    assert count_shared([a, c], [b, flipped]) == 1
    assert count_shared([{"text": "x"}, {"text": "y"}], [{"text": "y"}]) == 1
    assert count_shared([a | {"tools": [1]}], [a]) == 0  # another prompt


def test_training_warns_of_what_files_share(command, tmp_path):
    code, said = command(f"train-dpo --model m --data a.jsonl --eval-data all.jsonl {FEW} --out o")
    assert code == 0 and "all.jsonl: the prompts of 4 of 6 rows are in the training data too" in said
    flipped = [PAIRS[0], {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*flipped, PAIRS[0]]))
    code, said = command(f"train-dpo --model m --data f.jsonl {FEW} --out p")
    assert code == 0 and "f.jsonl: 1 of 3 rows have the texts of another row" in said
    assert "f.jsonl: 2 pairs are in it the other way round too" in said


@pytest.mark.parametrize("command_name", ["sample", "make-prefs", "evaluate"])
def test_long_prompts_are_truncated_in_every_command(command, tmp_path, command_name):
    rows = [{"prompt": "Is the film good?"}, {"prompt": "believe me, the film was great. " * 40}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"make-prefs": "--scorer python:s.py:f --completions 2", "evaluate": "--ref m --scorer python:s.py:f"}
    line = f"{command_name} --model m --prompts long.jsonl --max-new-tokens 4 {more.get(command_name, '')}"
    code, said = command(f"{line} --out o.jsonl")
    assert code == 0 and "1 of 2 prompts are too long for the model's context of 64 tokens" in said, said
    code, said = command(f"{line} --max-prompt-length 3 --out p.jsonl")
    assert code == 0 and "2 of 2 prompts are too long for --max-prompt-length 3" in said, said


def test_the_output_of_make_prefs_is_a_file_of_prompts(command, tmp_path):
    line = "--model m --max-new-tokens 4 --generation-batch-size 8"
    assert command(f"make-prefs {line} --prompts all.jsonl --scorer python:s.py:f --out prefs.jsonl")[0] == 0
    made = load_rows(tmp_path / "prefs.jsonl", "preferences").rows
    assert len(made) > len({row["prompt_id"] for row in made})
    code, said = command(f"sample {line} --prompts prefs.jsonl --out again.jsonl")
    assert code == 0 and "repeat the prompt of another row" in said
    sampled = [json.loads(text) for text in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in sampled} == {row["prompt"] for row in made} and "chosen_ids" not in sampled[0]


# --- every kind of file by every command ----------------------------------------------------------------------------


def kinds(made):
    """Small files of every kind, good and bad, by name."""
    message = {"role": "user", "content": "Is it good?"}
    answer = {"role": "assistant", "content": "Yes."}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = {
        "hh": [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
        "orca": [{"system": "S", "question": "q", "chosen": "a", "rejected": "b"}],
        "alpaca": [{"instruction": "q", "input": "i", "output": "a"}, {"instruction": "q", "input": "", "output": "b"}],
        "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
        "chat": [{"prompt": [message], "chosen": [answer], "rejected": [{**answer, "content": "No."}]}],
        "tools": [
            {"prompt": [message, call, {"role": "tool", "content": "x"}], "completion": [answer], "tools": [tool]}
        ],
        "call": [{"prompt": [message], "chosen": [call], "rejected": [answer], "tools": [tool]}],
        "mixed": [{"prompt": [message]}, {"prompt": "a"}, {"text": "a"}, {"messages": [message, answer]}],
        "completions": [{"prompt": "a", "completion": "b"}, {"prompt": [message], "completion": [answer]}],
        "long": [{"prompt": "a " * 500, "chosen": "b " * 300, "rejected": "c", "completion": "d"}],
        "odd": [
            {"prompt": {"a": 1}, "chosen": 3, "rejected": [None], "completion": [[]], "messages": [{}], "text": []}
        ],
        "parts": [{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "a"}],
        "fields": [{"prompt": "a", "completion": "b", "k": "x", "tools": "{", "system": 3, "history": [1]}],
    }
    for name, content in rows.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (made / "list.json").write_text(json.dumps(PAIRS))
    (made / "cut.json").write_text(json.dumps(PAIRS)[:-9])
    (made / "table.csv").write_text('prompt,chosen,rejected\na,b,c\n"d,e\n')
    datasets.Dataset.from_list(PAIRS).to_parquet(made / "table.parquet")
    (made / "broken.parquet").write_bytes(b"PAR1")
    (made / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (made / "empty.jsonl").write_text("")
    datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS)).save_to_disk(made / "saved")
    names = [f"{name}.jsonl" for name in rows]
    names += ["list.json", "cut.json", "table.csv", "table.parquet", "broken.parquet", "latin.jsonl", "empty.jsonl"]
    return [*names, "saved", ".", "m", "hub:nix/none", "hub:"]


FEWER = "--max-steps 1 --warmup-steps 0 --batch-size 2 --max-length 48 --max-prompt-length 24"
SHORT = "--scorer python:s.py:f --max-new-tokens 2"
COMMANDS = {
    "sft": f"sft --model m --data FILE {FEWER} --out o",
    "sft --field": f"sft --model m --field chosen --data FILE {FEWER} --out o",
    "train-dpo": f"train-dpo --model m --data FILE --eval-data FILE {FEWER} --out o",
    "train-rm": f"train-rm --model m --data a.jsonl --eval-data FILE {FEWER} --out o",
    "train-ppo": f"train-ppo --model m --prompts FILE --reward python:s.py:f --max-new-tokens 2 {FEWER} "
    "--minibatch-size 2 --out o",
    "make-prefs": f"make-prefs --model m --prompts FILE --completions 2 {SHORT} --out o.jsonl",
    "sample": "sample --model m --prompts FILE --max-new-tokens 2 --out o.jsonl",
    "score": "score --data FILE --scorer python:s.py:f --out o.jsonl",
    "evaluate": f"evaluate --model m --ref m --prompts FILE {SHORT} --out o.jsonl",
    "evaluate --completions": "evaluate --completions FILE --scorer python:s.py:f --out o.jsonl",
    "judge": "judge FILE --backend scorer --scorer python:s.py:f --out o.jsonl",
    "preview": "preview FILE --model m --eval-prompts FILE --rows 9",
    "report": "report FILE --out o",
    "prepare": "prepare hh --source FILE --train-prompts 1 --test-prompts 1 --out o",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_ends_in_a_traceback_on_any_file(folder, tmp_path_factory, monkeypatch, capsys, name):
    made = tmp_path_factory.mktemp("kinds")
    for file in folder.iterdir():
        if file.name != "cache":
            (made / file.name).symlink_to(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(made)
    wrong = {}
    for number, file in enumerate(kinds(made)):
        line = COMMANDS[name].replace("FILE", file)
        line = f"{line}{number}.jsonl" if line.endswith("o.jsonl") else f"{line}{number}"
        try:
            code, text = run(line.split()), capsys.readouterr().err
        except Exception:  # an internal error, which ends a command with its traceback
            code, text = 1, traceback.format_exc()
        if code not in (0, 2) or (code == 2 and "error: " not in text) or "Traceback" in text:
            wrong[file] = (code, text[-600:])
    assert not wrong
