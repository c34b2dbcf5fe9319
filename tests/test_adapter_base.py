"""An adapter finds its base wherever it is used, recognises it by content, and brings the tokens that it added."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import zoo
from dpoctl.cli.app import run as command_line
from dpoctl.errors import InputError
from dpoctl.models.load import load_policy
from dpoctl.outputs import adapter_base

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 6, 7, 8, 9]])
TRAIN = "--max-steps 1 --batch-size 2 --warmup-steps 0 --lr 1e-2"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model `base` and preferences, as the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    zoo.save(work / "base", "llama")
    rows = [{"prompt": f"stone {i}:", "chosen": " river bread", "rejected": " winter"} for i in range(2)]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(work)
    return work


def logits(path: str) -> torch.Tensor:
    with torch.no_grad():
        return load_policy(path).model(input_ids=IDS).logits


def train(model: str = "base", out: str = "runs/lora") -> None:
    assert command_line(f"train-dpo --model {model} --data pairs.jsonl --lora 2 --out {out} {TRAIN}".split()) == 0


def test_an_adapter_of_a_relative_model_works_from_any_directory_and_after_a_move(place, monkeypatch):
    train()
    expected = logits("runs/lora")
    assert not torch.allclose(expected, logits("base"), atol=1e-4)
    monkeypatch.chdir(place.parent)
    assert torch.equal(logits("work/runs/lora"), expected)
    # plain peft finds it, too
    named = json.loads((place / "runs/lora/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(place / "base")
    place.rename(place.parent / "elsewhere")  # together they keep their relative places
    assert torch.equal(logits("elsewhere/runs/lora"), expected)
    command = "sample --model elsewhere/runs/lora --prompts elsewhere/pairs.jsonl --max-new-tokens 2 --out s.jsonl"
    assert command_line(command.split()) == 0


def test_another_base_is_refused_and_a_missing_one_is_named(place, capsys):
    train()
    zoo.save(place / "other", "llama", perturbed=True)
    shutil.move("base", "kept")
    capsys.readouterr()
    sample = "sample --model runs/lora --prompts pairs.jsonl --max-new-tokens 2 --out s.jsonl"
    assert command_line(sample.split()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"runs/lora: an adapter, whose base model {place / 'base'} does not exist" in said and "--base" in said

    shutil.copytree("other", "base")
    assert command_line(sample.split()) == 2
    assert "is not the model that it was trained on" in " ".join(capsys.readouterr().err.split())
    assert command_line("merge runs/lora --base other --out merged".split()) == 2
    assert "other is not the model that it was trained on" in " ".join(capsys.readouterr().err.split())
    assert command_line("merge runs/lora --base kept --out merged".split()) == 0
    shutil.rmtree("base")
    shutil.move("kept", "base")
    assert torch.allclose(logits("merged"), logits("runs/lora"), atol=1e-6)


def test_a_damaged_record_is_refused(place):
    train()
    (place / "runs/lora/base_model.json").write_text("{}")
    with pytest.raises(InputError, match=r"base_model.json: damaged"):
        adapter_base.find("runs/lora")


@pytest.mark.parametrize("saved", ["auto", False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [3, zoo.EMBEDDINGS]}},
        {"trainable_token_indices": [2, 3]},
        {},
    ],
)
def test_adapters_with_added_tokens(tmp_path, options, tied, saved):
    """As peft computes on the resized base; `auto` saves the resized embeddings too, partly twice."""
    kind, added = ("llama-tied" if tied else "llama"), zoo.EMBEDDINGS
    zoo.save(tmp_path / "base", kind)
    tokenizer, model = copy.deepcopy(zoo.make_tokenizer()), zoo.make_model(kind)
    tokenizer.add_tokens([f"<{i}>" for i in range(added + 2 - len(tokenizer))])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(2)
    # Without the embeddings in the file, the added columns of an untrained head are not known.
    knows_all = saved == "auto" or "lm_head" in options.get("modules_to_save", ())
    ids = torch.tensor([[5, 6, 3, 2, added]])
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
        expected = adapted(input_ids=ids).logits
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved)
    tokenizer.save_pretrained(tmp_path / "adapter")

    if saved is False and "embed_tokens" not in str(options):  # nothing holds the new tokens' embeddings
        with pytest.raises(InputError, match="only 384 embeddings"):
            load_policy(str(tmp_path / "adapter"))
        return
    with torch.no_grad():
        found = load_policy(str(tmp_path / "adapter")).model(input_ids=ids).logits
        columns = slice(None) if knows_all else slice(added)
        assert torch.allclose(found[..., columns], expected[..., columns], atol=1e-5)
        assert command_line(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
        assert torch.allclose(again[..., columns], found[..., columns], atol=1e-6)
