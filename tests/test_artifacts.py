"""Claims, locks, atomic writes and manifests; options from flags and recipes."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from dpoctl.cli.app import run
from dpoctl.config.commands import COMMANDS
from dpoctl.config.resolve import resolve
from dpoctl.config.schema import flag_of, spec_of
from dpoctl.config.training import TrainDPO
from dpoctl.errors import InputError, StorageError
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
    with pytest.raises(InputError, match="another dpoctl process is writing it"), claim(tmp_path / "run"):
        pass
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


def test_flags_override_the_section_which_overrides_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("defaults:\n  seed: 3\n  lr: 1e-3\n  beta: 9\ntrain-dpo:\n  lr: 2e-6\n  batch-size: 8\n")
    given = {"model": "m", "data": "d", "out": "o", "batch_size": 16}
    config = resolve(TrainDPO, "train-dpo", given, str(recipe))
    assert (config.seed, config.lr, config.batch_size, config.beta) == (3, 2e-6, 16, 9.0)


def test_all_mistakes_are_reported_at_once_with_place_and_nearest_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train-dpo:\n  betta: 1\n  lr: fast\n  loss: sigmoidd\ntrain-dop:\n  beta: 1\n")
    with pytest.raises(InputError) as e:
        resolve(TrainDPO, "train-dpo", {"model": "m", "data": "d"}, str(recipe))
    for message in (
        ":2: train-dpo.betta: no such option (did you mean beta?)",
        ":3: train-dpo.lr: expected a number, got 'fast'",
        "did you mean sigmoid?",
        ":5: train-dop: no such section (did you mean train-dpo?)",
        "--out is required",
    ):
        assert message in e.value.message


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_options_of_the_command_and_no_others(name, capsys):
    assert run([name, "--help"]) == 0
    shown = set(re.findall(r"^│ (?:-\w, )?(--[a-z][a-z0-9-]*)", capsys.readouterr().out, re.M))
    options = {flag_of(f) for f in fields(COMMANDS[name]) if not spec_of(f).argument}
    assert options <= shown, options - shown
    assert shown - options <= {"--config", "--json", "--verbose", "--quiet", "--help"}
    assert all(spec_of(f).help for f in fields(COMMANDS[name]))


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
