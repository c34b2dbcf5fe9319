"""Outputs: claims and locks, atomic writes, manifests, and rows without NaN."""

import errno
import json
import os
import subprocess
import sys

import pytest

from dpoctl.cli.app import run
from dpoctl.errors import InputError, OutputInUse, StorageError
from dpoctl.outputs import claims, files, manifests

pytestmark = pytest.mark.usefixtures("cache")


def claim(out, identity=None, inputs=(), overwrite=False, stage="sft"):
    request = claims.Request(str(out), stage, identity or {}, identity or {}, list(inputs))
    return claims.claim(request, overwrite=overwrite)


def finished(out, **more):
    with claim(out, **more) as output:
        (out / "config.yaml").write_text("a: 1\n")
        output.finish([(out / "config.yaml", None)], {"loss": 1.0}, {"wall": 3})


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomic(path, "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_complete_changed_and_overwritten_outputs(tmp_path):
    out, data = tmp_path / "run", tmp_path / "data.jsonl"
    data.write_text("1\n")
    inputs = [("data", "file", str(data))]
    finished(out, identity={"beta": 0.1}, inputs=inputs)
    with claim(out, {"beta": 0.1}, inputs) as output:
        assert output.finished
    with pytest.raises(InputError, match="--beta 0.1, now it is 0.2"), claim(out, {"beta": 0.2}, inputs):
        pass
    data.write_text("2\n")
    with pytest.raises(InputError, match="different --data"), claim(out, {"beta": 0.1}, inputs):
        pass
    (out / "mine.txt").write_text("written by the user")
    with claim(out, {"beta": 0.2}, inputs, overwrite=True) as output:
        assert not output.finished and not output.resuming and not (out / "config.yaml").exists()
    assert (out / "mine.txt").exists()


def test_the_id_of_a_manifest_leaves_out_the_cost(tmp_path):
    ids = []
    for name, identity in (("a", {"x": 1}), ("b", {"x": 1}), ("c", {"x": 2})):
        finished(tmp_path / name / "run", identity=identity)
        ids.append(manifests.read_manifest(tmp_path / name / "run")["id"])
    assert ids[0] == ids[1] != ids[2]


def test_a_directory_of_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="thesis.tex"), claim(tmp_path, overwrite=overwrite):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_name_that_the_output_cannot_have_is_answered_with_one_that_it_can(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("foreign.txt", "taken.txt", "taken.jsonl"):
        (tmp_path / name).write_text("{}\n")
    score = ["score", "--data", "taken.jsonl", "--scorer", "m", "--out"]
    sft = ["sft", "--model", "m", "--data", "taken.jsonl", "--out"]
    for argv, said in (
        ([*score, "foreign.txt"], "foreign.txt: score writes JSONL\nhint: for example --out foreign.jsonl"),
        ([*score, "taken.txt"], "hint: choose another --out that ends with .jsonl"),
        ([*score, "in/rows"], "hint: for example --out in/rows.jsonl"),
        ([*sft, "foreign.txt"], "foreign.txt: is a file; a directory is needed\nhint: for example --out foreign"),
        ([*sft, "in/o.jsonl"], "o.jsonl: sft writes a directory\nhint: for example --out in/o"),
        (["merge", "foreign.txt", "--out", "o"], "foreign.txt: neither a shard nor an adapter's directory\nhint: "),
        (["merge", "foreign.txt", "--base", "b", "--out", "o"], "foreign.txt: neither a shard nor an adapter's"),
        (["merge", "none.txt", "--out", "o"], "none.txt: not found (INPUTS)"),
    ):
        assert run(argv) == 2
        assert said in capsys.readouterr().err, argv
    assert {p.name for p in tmp_path.iterdir()} == {"foreign.txt", "taken.txt", "taken.jsonl"}


def test_a_refused_input_leaves_no_files(tmp_path):
    with pytest.raises(InputError), claim(tmp_path / "run"):
        raise InputError("bad row")
    with pytest.raises(InputError), claim(tmp_path / "rows.jsonl", stage="sample"):
        raise InputError("bad row")
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_locked_until_its_process_ends(tmp_path):
    code = (
        "import sys, time; from dpoctl.outputs import claims\n"
        f"request = claims.Request({str(tmp_path / 'run')!r}, 'sft', {{}}, {{}}, [])\n"
        "with claims.claim(request, overwrite=False):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputInUse, match="another dpoctl process is writing it") as refused, claim(tmp_path / "run"):
        pass
    assert refused.value.exit_code == 75
    holder.kill()
    holder.wait()
    with claim(tmp_path / "run") as output:
        assert output.resuming


def test_the_hash_of_a_large_file_is_cached_until_it_changes(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * (1 << 20))
    first = files.sha256_file(path)
    assert files.sha256_file(path) == first and len(list((tmp_path / "cache/dpoctl/sha256").iterdir())) == 1
    path.write_bytes(b"b" * (1 << 20))
    assert files.sha256_file(path) != first


def test_a_full_disk_exits_with_2_and_names_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(claims, "write_atomic", full)
    code = run(["sft", "--model", "m/m", "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert code == 2 and "No space left" in said and "hint:" in said


def test_a_row_holds_null_for_nan_and_infinity():
    row = {"a": float("nan"), "b": [float("-inf"), 1.0], "c": {"d": float("inf")}, "e": "é"}
    assert files.json_line(row) == '{"a": null, "b": [null, 1.0], "c": {"d": null}, "e": "é"}\n'
    assert files.json_line({"a": 1.5}) == '{"a": 1.5}\n'
