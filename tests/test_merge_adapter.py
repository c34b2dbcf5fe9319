"""An adapter merged into its base computes the same function, in a directory that loads without peft."""

import json
import shutil
import sys

import pytest
import torch

from dpoctl.cli.app import run as command_line

peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(world, monkeypatch):
    """(adapter's logits on its base, ids) of a LoRA adapter at world/adapter whose weights are anything but zero."""
    from dpoctl.models.load import load_policy

    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", world.env["XDG_CACHE_HOME"])
    model = load_policy("lm").model
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    shutil.rmtree("adapter", ignore_errors=True)
    model.save_pretrained("adapter")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits, ids


def merge(capsys, *args: str, code: int = 0) -> str:
    capsys.readouterr()
    assert command_line(["merge", *args]) == code
    return capsys.readouterr().err


def rewrite(**fields) -> None:
    with open("adapter/adapter_config.json") as f:
        config = json.load(f) | fields
    with open("adapter/adapter_config.json", "w") as f:
        json.dump(config, f)


def test_the_merged_model_computes_the_same_function(adapted, world, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected, ids = adapted
    said = merge(capsys, "adapter", "--base", "lm", "--out", "merged")
    assert "adapter merged into lm" in " ".join(said.split())
    model = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained("lm")
        assert not torch.allclose(base(input_ids=ids).logits, expected, atol=1e-2)
    names = {name for name, _ in model.named_parameters()}
    assert (
        names == {name for name, _ in base.named_parameters()}
        and not (world.folder / "merged/adapter_config.json").exists()
    )
    assert len(AutoTokenizer.from_pretrained("merged")) == model.config.vocab_size
    manifest = json.loads((world.folder / "merged/manifest.json").read_text())
    assert [i["name"] for i in manifest["inputs"]] == ["inputs", "base"] and manifest["stage"] == "merge"
    assert "nothing to do" in merge(capsys, "adapter", "--base", "lm", "--out", "merged")

    # the base that the adapter names itself; another precision
    rewrite(base_model_name_or_path="lm")
    merge(capsys, "adapter", "--save-dtype", "bfloat16", "--out", "named")
    assert AutoModelForCausalLM.from_pretrained("named", dtype="auto").dtype == torch.bfloat16


def test_adapters_that_do_not_fit_are_refused(adapted, world, capsys, monkeypatch):
    rewrite(base_model_name_or_path=None)
    assert "names no base model" in merge(capsys, "adapter", "--out", "no", code=2)
    rewrite(target_modules=["c_attn"])  # weights that have no place
    assert "does not fit lm" in merge(capsys, "adapter", "--base", "lm", "--out", "no", code=2)
    rewrite(target_modules=["c_attn", "c_fc", "c_proj"])  # places that have no weights
    assert "does not fit lm" in merge(capsys, "adapter", "--base", "lm", "--out", "no", code=2)
    rewrite(target_modules=["c_attn", "c_fc"], r=2)
    assert "does not fit lm" in merge(capsys, "adapter", "--base", "lm", "--out", "no", code=2)
    rewrite(r=4, task_type="SEQ_CLS")
    assert "an adapter of task SEQ_CLS" in merge(capsys, "adapter", "--base", "lm", "--out", "no", code=2)
    assert "no adapter, it has no adapter_model.safetensors" in merge(
        capsys, "lm", "--base", "lm", "--out", "no", code=2
    )
    assert "not an adapter's directory" in merge(capsys, "lm", "--out", "no", code=2)
    rewrite(task_type="CAUSAL_LM")
    with open("adapter/adapter_model.safetensors", "r+b") as f:
        f.truncate(100)
    assert "cannot be read as an adapter" in merge(capsys, "adapter", "--base", "lm", "--out", "no", code=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'dpoctl[lora]'" in merge(capsys, "adapter", "--base", "lm", "--out", "no", code=2)
    assert not (world.folder / "no").exists()
