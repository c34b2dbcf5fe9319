"""Frozen weights in the compute dtype: the numbers of float32 weights under autocast, to the bit, in less memory."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
)

from dpoctl.cli.app import run as command_line
from dpoctl.inference.decoding import open_decoding
from dpoctl.models import precision
from dpoctl.models.load import load_classifier, load_policy
from dpoctl.models.logprobs import response_logps
from dpoctl.models.place import Place
from dpoctl.models.precision import Float32Linear, full_precision, hold
from dpoctl.models.pretrained import prepared
from dpoctl.models.probes import has_plain_head

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "neox": GPTNeoXConfig(**SMALL),
    "llama": LlamaConfig(**GROUPED),
    "tied llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "phi": PhiConfig(**GROUPED),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}
SEQUENCES = [([5, 7, 9, 11, 13], 2), ([5, 7, 21, 30], 2), ([40, 41, 42, 43, 44, 45, 46], 3)]


def make(name: str):
    torch.manual_seed(0)
    model = prepared(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def held(model):
    result = copy.deepcopy(model).requires_grad_(False)
    hold(result, torch.bfloat16)
    return result


def size(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_of_autocast_over_float32_weights(name):
    model = make(name)
    frozen = held(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (response_logps(m, SEQUENCES, tokens_per_batch=64) for m in (model, frozen))
        ids = torch.arange(8)[None]
        logits = [m(ids).logits for m in (model, frozen)]
    assert torch.equal(found, expected)
    assert torch.equal(*logits)
    # and the same samples, token by token, through the key cache
    for m in (model, frozen):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            batch = open_decoding(m, [[5, 7, 9], [11, 13]], [0, 1], 4)
            states = [batch.prefill(), batch.step([3, 4], {0, 1})]
        expected, found = found, torch.cat(states)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_cast_and_what_is_not(name):
    model = make(name)
    before = size(model)
    frozen = held(model)
    low = sum(p.numel() for p in frozen.parameters() if p.dtype == torch.bfloat16)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    copied = model.get_output_embeddings().weight.numel() if tied else 0
    assert size(frozen) == before - 2 * (low - copied) + 2 * copied
    assert frozen.get_input_embeddings().weight.dtype == torch.float32
    assert frozen.get_output_embeddings().weight.dtype == torch.bfloat16
    norms = [p for n, p in frozen.named_parameters() if "norm" in n or "ln_" in n]
    assert norms and all(p.dtype == torch.float32 for p in norms)
    matrices = [p for n, p in frozen.named_parameters() if p.ndim > 1 and p is not frozen.get_input_embeddings().weight]
    positions = {"transformer.wpe.weight", "model.layers.0.mlp.gate.weight"}
    shapes = {tuple(p.shape) for n, p in frozen.named_parameters() if n in positions}
    assert all(p.dtype == torch.bfloat16 or tuple(p.shape) in shapes for p in matrices)


def test_weights_that_are_trained_stay_float32():
    model = make("llama")
    model.model.layers[0].mlp.requires_grad_(False)
    hold(model, torch.bfloat16)
    low = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_in_full_precision_a_held_model_computes_in_float32():
    model = make("llama")
    frozen = held(model)
    rounded = copy.deepcopy(model)
    for p, q in zip(rounded.parameters(), frozen.parameters(), strict=True):
        p.data.copy_(q)
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16), full_precision(frozen, torch.device("cpu")):
        found = frozen(ids).logits
    assert found.dtype == torch.float32 and torch.equal(found, rounded(ids).logits)
    assert size(frozen) == size(held(model))  # and afterwards it is held as before
    assert has_plain_head(frozen)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_cached_keys_have_the_dtype_of_the_values(name):
    model = held(make(name))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        batch = open_decoding(model, [[5, 7, 9], [11, 13]], [0, 1], 4)
        batch.prefill()
        batch.step([3, 4], {0, 1})
    layers = batch.batches[0].cache.layers
    assert all(b.dtype == torch.bfloat16 for layer in layers for b in layer.buffers)


def test_loading_freezes_and_casts(here):
    policy = load_policy("sft", Place(frozen_in=torch.bfloat16)).model
    assert not any(p.requires_grad for p in policy.parameters())
    assert any(p.dtype == torch.bfloat16 for p in policy.parameters())
    policy = load_policy("sft").model
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    classifier = load_classifier("classifier", Place(frozen_in=torch.bfloat16)).model
    heads = [m for m in classifier.modules() if isinstance(m, Float32Linear)]
    assert len(heads) == 1 and heads[0].weight.dtype == torch.float32


TRAINING = "--lora 4 --max-length 96 --max-prompt-length 16 --warmup-steps 0 --max-steps 2 --lr 1e-3 --log-every 1"
EVALUATED = "--eval-prompts test.jsonl --scorer classifier --eval-limit 4 --max-new-tokens 6"
RUNS = {
    "dpo": f"train-dpo --model sft --data prefs.jsonl --batch-size 8 {TRAINING} {EVALUATED}",
    "rm": f"train-rm --model sft --data prefs.jsonl --batch-size 8 {TRAINING}",
    "ppo": f"train-ppo --model sft --prompts train.jsonl --reward classifier --batch-size 8 --minibatch-size 4 "
    f"--ppo-epochs 1 --max-new-tokens 6 {TRAINING}",
}


@pytest.mark.parametrize("name", RUNS)
def test_adapters_train_as_on_a_float32_base(here, name, monkeypatch):
    """Adapters, references, scorers and the policy that is sampled: all metrics are the same to the last digit."""
    for how in ("held", "cast"):
        command = [*RUNS[name].split(), "--dtype", "bfloat16", "--cache-dir", how, "--out", f"{name}-{how}"]
        assert command_line([c for c in command if name == "dpo" or c not in ("--cache-dir", how)]) == 0
        monkeypatch.setattr(precision, "hold", lambda model, dtype: None)
    files = ["metrics.jsonl", *(["eval.jsonl"] if name == "dpo" else [])]
    for file in files:
        held, cast = (here.rows(f"{name}-{how}/{file}") for how in ("held", "cast"))
        assert held and [row | {"model": ""} for row in held] == [row | {"model": ""} for row in cast]


def test_a_head_is_kept_in_float32_once():
    """A mixture's gate of one output is not taken for the head where the head is found a second time."""
    model = torch.nn.ModuleDict({"shared_expert_gate": torch.nn.Linear(4, 1), "score": torch.nn.Linear(4, 1)})
    for _ in range(2):  # an adapter's base is prepared when it is loaded, and again as a classifier
        precision.keep_head_in_float32(model, 1)
    assert [type(module) for module in model.values()] == [torch.nn.Linear, Float32Linear]
