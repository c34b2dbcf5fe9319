"""Loading: what a good directory gives, and one clear refusal for each bad one."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from dpoctl.errors import InputError
from dpoctl.models import hub, load
from dpoctl.models.hub import resolve
from dpoctl.models.load import context_length, load_classifier, load_policy, untrained
from dpoctl.models.place import Place
from dpoctl.models.tokenizers import end_tokens, load_tokenizer

VOCAB = 40
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "vocab_size": VOCAB}


def save_tokenizer(folder, words=VOCAB, **special):
    vocabulary = {"<eos>": 0} | {f"w{i}": i for i in range(1, words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, **({"eos_token": "<eos>"} | special)).save_pretrained(folder)


def save(folder, model, **tokenizer):
    model.save_pretrained(folder)
    save_tokenizer(folder, **tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Directories of a GPT-2 policy and of a classifier on the same backbone."""
    root = tmp_path_factory.mktemp("models")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=24, **IDS)
    save(root / "policy", GPT2LMHeadModel(config).to(torch.bfloat16))
    save(root / "classifier", GPT2ForSequenceClassification(config))
    return root


def test_a_policy_comes_in_float32_in_eval_mode_without_dropout_and_with_a_pad_token(good):
    model, tokenizer, _ = load_policy(str(good / "policy"))
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.pad_token == "<eos>" and len(tokenizer) == VOCAB == len(model.get_input_embeddings().weight)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert model.config.attn_pdrop == model.config.resid_pdrop == model.config.embd_pdrop == 0.0
    ids = torch.arange(10)[None]
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert context_length(model) == 24


def test_dropout_kept_as_a_number_in_attention_is_zeroed_too(tmp_path):
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        **IDS,
        attention_dropout=0.5,
        max_position_embeddings=16,
    )
    model = load_policy(save(tmp_path, LlamaForCausalLM(config))).model
    model.train()
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_classifier_gets_the_pad_token_of_its_tokenizer(good, tmp_path):
    model, tokenizer, _ = load_classifier(str(good / "classifier"))
    assert model.config.pad_token_id is tokenizer.pad_token_id is None  # it has none: no token is taken for padding
    folder = shutil.copytree(good / "classifier", tmp_path / "padded")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    model, tokenizer, _ = load_classifier(str(folder))
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    with torch.no_grad():
        padded = model(torch.tensor([[3, 4, 0, 0], [3, 4, 5, 6]])).logits[0]
        assert torch.allclose(padded, model(torch.tensor([[3, 4]])).logits[0], atol=1e-6)


def test_resolve_leaves_directories_alone_and_names_what_is_missing(good, monkeypatch):
    monkeypatch.chdir(good)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("policy") == "policy" and resolve(str(good / "policy")) == str(good / "policy")
    with pytest.raises(InputError, match=r"\./polcy: no such model directory\nhint: did you mean policy\?"):
        resolve("./polcy")
    with pytest.raises(InputError, match="clasifier: no such model directory\nhint: .*classifier"):
        resolve(str(good / "clasifier"))
    with pytest.raises(InputError, match=r"polcy: no such directory; .*Hub.*\nhint: did you mean policy\? Otherwise "):
        resolve("polcy")  # could be a hub id: said to be neither
    with pytest.raises(InputError, match="policy/config.json: is a file"):
        resolve("policy/config.json")
    with pytest.raises(InputError, match="no config.json\nhint: there is a model in .*classifier"):
        resolve(str(good))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("RepositoryNotFoundError", 404, "not found on the Hub\nhint: check the spelling; a private"),
        ("GatedRepoError", 403, "its repository on the Hub is gated\nhint: request access"),
        ("RevisionNotFoundError", 404, "the Hub has no revision v2 of it\nhint: give a branch"),
        ("HfHubHTTPError", 503, "the Hub answers with status 503\nhint: try again later"),
        ("LocalEntryNotFoundError", 0, "not in the Hub's cache and the Hub cannot be reached\nhint: check the network"),
    ],
)
def test_the_hub_s_errors_are_told_in_a_line(error, status, said, monkeypatch):
    """The library's message, of several sentences, is not quoted; its own exception types are raised here."""
    kind = getattr(errors, error)
    raised = kind.__new__(kind)
    raised.args = ("A long sentence. Another one, with https://an.address.",)
    raised.response = SimpleNamespace(status_code=status) if status else None

    def snapshot(*args, **kwargs):
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(InputError) as refused:
        resolve("some/model", "v2")
    assert str(refused.value).startswith(f"some/model: no such directory; {said}")
    assert "sentence" not in str(refused.value)


def test_what_a_plan_looks_at_needs_no_weights_from_the_hub(good, monkeypatch):
    asked = []

    def snapshot(repository, revision, allow_patterns, ignore_patterns):
        asked.append(set(allow_patterns))
        return str(good / "policy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    shape = untrained("some/model", "policy")
    assert shape.config.n_embd == 8 and load_tokenizer("some/model").eos_token == "<eos>"
    weights = {"*.safetensors", "*.bin"}
    assert len(asked) == 2 and not any(patterns & weights for patterns in asked)
    load_policy("some/model")
    assert "*.safetensors" in asked[2]


def broken(good, tmp_path, name="policy"):
    return shutil.copytree(good / name, tmp_path / "model")


def refused(folder, message, loader=load_policy):
    with pytest.raises(InputError, match=message) as caught:
        loader(str(folder))
    assert str(folder) in caught.value.message
    assert len(caught.value.message.splitlines()) <= 2 and "\n" not in caught.value.hint


def test_weights_missing_cut_short_or_of_another_shape(good, tmp_path):
    folder = broken(good, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(folder, "cannot be loaded")
    weights.unlink()
    refused(folder, "no weights")
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 2}))
    refused(folder, r"wte.weight is \[40, 8\] in the weights, \[42, 8\] by config.json")
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    refused(folder, "of its weights are missing")
    (folder / "config.json").write_text("{")
    refused(folder, "cannot be loaded.*JSON")
    (folder / "config.json").write_text('{"model_type": "nothing-known"}')
    refused(folder, "cannot be loaded.*nothing-known")


def test_a_pickle_runs_no_code(good, tmp_path):
    folder = broken(good, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    refused(folder, "more than tensors")
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_models_of_another_kind(good, tmp_path):
    refused(good / "classifier", "a GPT2ForSequenceClassification, where a causal language model is expected")
    refused(good / "policy", r"sequence classifier: .* missing \(score.weight", load_classifier)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**small, vocab_size=VOCAB, max_position_embeddings=20)
    masked = save(tmp_path / "masked", RobertaForMaskedLM(config))
    refused(masked, "causal language model")
    refused(masked, r"classifier\.", load_classifier)
    refused(save(tmp_path / "roberta", RobertaForSequenceClassification(config)), "causal language model")


def test_tokenizers_missing_broken_or_of_another_model(good, tmp_path):
    folder = broken(good, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer cannot be read")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "no tokenizer")
    save_tokenizer(folder, words=VOCAB + 3)
    refused(folder, "does not fit the model: highest token id 42, only 40 embeddings")
    save_tokenizer(folder, eos_token=None)
    refused(folder, "no end-of-sequence token")


def test_a_mistyped_path_is_answered_without_torch():
    code = "import sys; import dpoctl.models.hub; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}'])
def test_a_broken_generation_config_is_refused(tmp_path, content):
    """Without it, sampling would not stop where the model's does."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_tokens(str(tmp_path)) == [7]
    (tmp_path / "config.json").write_text('{"eos_token_id": [-1, 7]}')  # -1 is no token
    assert end_tokens(str(tmp_path)) == [7]
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match="generation_config.json: cannot be read") as error:
        end_tokens(str(tmp_path))
    assert "eos_token_id" in error.value.hint


def test_the_shape_of_a_hub_model_needs_no_weights(tmp_path, monkeypatch):
    """A rank that gets its shard later fetches configuration and tokenizer alone; an adapter it fetches whole."""
    asked = []
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text("{}")

    def fetch(path, revision, patterns):
        asked.append(patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "_fetch", fetch)

    assert load._folder("some/model", None, False, Place("meta")) == str(tmp_path)
    assert len(asked) == 1 and "*.safetensors" not in asked[0]
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    load._folder("some/model", None, False, Place("meta"))
    assert "*.safetensors" in asked[-1]
