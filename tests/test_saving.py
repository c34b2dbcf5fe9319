"""What a run directory holds beside the weights: everything that the start directory held, readable by others."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from architectures import zoo
from dpoctl.cli.app import run as command_line

TRAIN = "train-dpo --model base --data pairs.jsonl --max-steps 2 --batch-size 2 --warmup-steps 0"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model `base` and preferences, as the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    zoo.save(tmp_path / "base", "llama", attention_dropout=0.25)
    rows = [{"prompt": f"stone {i}:", "chosen": " river bread", "rejected": " winter"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tokenizer_with_named_templates_is_saved_with_all_of_them(place):
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "tools"}
    tokenizer.save_pretrained("base")
    assert (place / "base/additional_chat_templates/tool_use.jinja").exists()
    assert command_line([*TRAIN.split(), "--out", "out"]) == 0
    assert AutoTokenizer.from_pretrained("out").chat_template == tokenizer.chat_template
    listed = [entry["path"] for entry in json.loads((place / "out/manifest.json").read_text())["outputs"]]
    assert "additional_chat_templates/tool_use.jinja" in listed
    assert command_line([*TRAIN.split(), "--out", "out"]) == 0  # complete: nothing to do
    assert command_line([*TRAIN.split(), "--out", "out", "--overwrite"]) == 0


def test_what_cannot_be_saved_is_known_before_the_first_update(place, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise TypeError("Object of type X is not JSON serializable")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    assert command_line([*TRAIN.split(), "--out", "out"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "its tokenizer was read, but cannot be saved with the trained model: TypeError: Object of type X" in said
    assert not (place / "out").exists()


def test_a_generation_configuration_that_contradicts_itself_is_saved_as_it_was(place):
    """As some models on the Hub have it: transformers reads such a file and refuses to save it once it was changed."""
    file = place / "base/generation_config.json"
    given = json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    file.write_text(json.dumps(given))
    assert command_line([*TRAIN.split(), "--out", "out"]) == 0
    saved = json.loads((place / "out/generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, False)


def test_all_files_have_the_permissions_of_the_umask(place):
    before = os.umask(0o027)
    try:
        assert command_line([*TRAIN.split(), "--save-every", "1", "--out", "out"]) == 0
    finally:
        os.umask(before)
    files = [path for path in (place / "out").rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert any(path.name == "model.safetensors" and "checkpoints" in str(path) for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_dropout_is_saved_as_it_was_and_not_used(place):
    assert command_line([*TRAIN.split(), "--out", "out"]) == 0
    assert json.loads((place / "out/config.json").read_text())["attention_dropout"] == 0.25
    first = json.loads((place / "out/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)  # with dropout the policy would not be its reference


@pytest.mark.parametrize(("lr", "few"), [("1e-6", True), ("1e-2", False)])
def test_the_share_of_changes_that_a_save_dtype_keeps_is_measured(place, capsys, lr, few):
    options = [*TRAIN.split(), "--optimizer", "adamw", "--lr", lr]
    assert command_line([*options, "--out", "exact"]) == 0
    capsys.readouterr()
    assert command_line([*options, "--save-dtype", "bfloat16", "--out", "short"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    start, exact, short = (load_file(place / name / "model.safetensors") for name in ("base", "exact", "short"))
    changed = {name: exact[name] != start[name] for name in exact}
    kept = sum(((short[n].float() != start[n].bfloat16().float()) & changed[n]).sum().item() for n in exact)
    share = kept / sum(c.sum().item() for c in changed.values())
    measured = json.loads((place / "short/manifest.json").read_text())["metrics"]["saved_changes"]
    assert measured == pytest.approx(share, abs=0.02)
    assert few == (share < 0.5) and few == ("are rounded back to what they were" in said)
    assert AutoModelForCausalLM.from_pretrained("short", dtype="auto").dtype == torch.bfloat16


def test_a_quantised_checkpoint_is_named_as_one(place, capsys):
    config = json.loads((place / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (place / "base/config.json").write_text(json.dumps(config))
    assert command_line([*TRAIN.split(), "--out", "out"]) == 2
    assert "its weights are quantised (gptq)" in " ".join(capsys.readouterr().err.split())
