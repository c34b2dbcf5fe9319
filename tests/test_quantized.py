"""Adapters on bases in 4 and 8 bits, and checkpoints that are quantised already: for real, on bitsandbytes' CPU path.

A quantised base computes as the plain model whose weights are the dequantised ones, which is what transformers and peft
compute, too.
"""

import copy
import json
import shutil

import pytest
import torch

from dpoctl.cli.app import run as command_line
from dpoctl.errors import InputError
from dpoctl.models import quantized
from dpoctl.models.load import load_classifier, load_policy
from dpoctl.models.logprobs import response_token_logps, summed_logps
from dpoctl.models.place import Place
from dpoctl.models.probes import can_pack, has_plain_head
from dpoctl.models.rewards import rewards_of

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from helpers.log_probs import one_by_one  # noqa: E402
from helpers.tiny_models import tiny_model  # noqa: E402

SHORT = "--max-length 96 --max-prompt-length 16 --warmup-steps 0 --batch-size 16 --epochs 9 --lora 4".split()
SEQUENCES = [([5, 6, 7, 8, 9, 10], 2), ([5, 6, 20, 21], 2), ([30, 31, 32, 33, 34], 3)]


@torch.no_grad()
def logps(model) -> torch.Tensor:
    """Summed log-probs of SEQUENCES, each forwarded alone."""
    return one_by_one(model, SEQUENCES)


def dequantized(model):
    """The plain float32 model with the weights that a quantised model computes with."""
    plain = copy.deepcopy(model.hf_plain)
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            target, weight = plain.get_submodule(name), quantized.weight_of(module, torch.float32)
            with torch.no_grad():
                target.weight.copy_(weight.t() if type(target).__name__ == "Conv1D" else weight)
    return plain.eval()


def opened(folder: str, bits: str):
    """A quantised model of dpoctl's, with the plain one that it was made from as `hf_plain`."""
    model = load_policy(folder, Place(quantize=bits)).model
    object.__setattr__(model, "hf_plain", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return model


def by_transformers(folder: str):
    """The model in 4 bits as transformers and bitsandbytes load and compute it."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it repacks the weights in place, in bfloat16
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox"])
def saved(request, world, tmp_path_factory):
    """A directory with a tiny model and a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    vocab = len(load_policy(str(world.folder / "lm")).tokenizer)
    tiny_model(request.param, vocab=vocab, width=64).save_pretrained(folder)
    load_policy(str(world.folder / "lm")).tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_model_is_the_plain_one_of_its_dequantised_weights(saved, bits):
    """Log-probs and gradients; packed, tiled and probed like any other."""
    model = opened(saved, bits)
    plain = dequantized(model)
    assert quantized.is_quantized(model) and not torch.allclose(logps(plain), logps(model.hf_plain), atol=1e-3)
    assert can_pack(model, 64)
    with torch.no_grad():
        assert torch.allclose(summed_logps(model, SEQUENCES), logps(plain), atol=1e-4)
    grads = []
    for each in (model, plain):
        embedding = each.get_input_embeddings().weight.requires_grad_()
        response_token_logps(each, SEQUENCES)[0].sum().backward()
        grads.append(embedding.grad.clone())
    assert torch.allclose(*grads, atol=1e-4 * grads[1].abs().max().item())
    # with a gradient and without, with other rows and alone: the same numbers
    with torch.no_grad():
        alone = torch.stack([summed_logps(model, [s])[0] for s in SEQUENCES])
    together = summed_logps(model, SEQUENCES)
    assert torch.allclose(alone, together.detach(), atol=1e-5)


def test_autocast_gives_its_own_precision(saved):
    model = load_policy(saved, Place(quantize="4bit")).model
    layer = next(m for m in model.modules() if type(m).__name__ == "Linear4bit")
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        expected = torch.nn.functional.linear(x, quantized.weight_of(layer, torch.bfloat16), layer.bias)
        assert torch.equal(layer(x), expected)
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("kind", [[], ["--use-dora"]], ids=["lora", "dora"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_dpo_on_a_quantised_base(here, bits, kind, capsys):
    """From train-dpo to sample; the adapter on the quantised base is the policy in plain transformers and peft."""
    out = f"dpo-{bits}{''.join(kind)}"
    points = "--eval-prompts test.jsonl --eval-limit 4 --scorer classifier --max-new-tokens 6 --eval-every 4".split()
    args = ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", *SHORT, "--quantize", bits, *kind, *points]
    args += "--lr 1e-3 --max-steps 4 --log-every 1 --save-every 2".split()
    assert command_line([*args, "--out", out]) == 0
    rows = here.rows(f"{out}/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert max(abs(row["loss"] - rows[0]["loss"]) for row in rows) > 1e-3
    assert here.rows(f"{out}/eval.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-4)  # the reference is quantised, too
    record = json.loads((here.folder / out / "base_model.json").read_text())
    assert record["trained_in"] == bits and "quantized" not in record

    ours = opened("sft", bits)
    plain = peft.PeftModel.from_pretrained(dequantized(ours), out).eval()
    attached = peft.PeftModel.from_pretrained(ours, out).eval()
    with torch.no_grad():
        policy = summed_logps(attached.get_base_model(), SEQUENCES)
    assert torch.allclose(policy, logps(plain), atol=1e-4)
    if bits == "4bit":  # in 8 bits bitsandbytes itself rounds the activations, too
        assert torch.allclose(
            policy, logps(peft.PeftModel.from_pretrained(by_transformers("sft"), out).eval()), atol=1e-4
        )

    # dpoctl's own commands read it merged into the base in full precision, and say so: other numbers, near ones
    capsys.readouterr()
    with torch.no_grad():
        merged = summed_logps(load_policy(out).model, SEQUENCES)
    assert not torch.equal(merged, policy) and torch.allclose(merged, policy, atol=2.0)
    full = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("sft", dtype=torch.float32), out).eval()
    assert torch.allclose(merged, logps(full), atol=1e-4)
    assert command_line(["merge", out, "--out", f"{out}-merged"]) == 0
    assert f"{out}: was trained on sft in {bits}, and is merged into it in full precision" in " ".join(
        capsys.readouterr().err.split()
    )
    assert torch.allclose(
        logps(AutoModelForCausalLM.from_pretrained(f"{out}-merged", dtype=torch.float32)), merged, atol=1e-4
    )
    sample = ["sample", "--model", out, "--prompts", "test.jsonl", "--max-new-tokens", "4", "--out", f"{out}.jsonl"]
    assert command_line(sample) == 0

    # training goes on from it, again on the quantised base
    if not kind:
        again = [*args[:2], out, *args[3:], "--max-steps", "1", "--out", f"{out}-again"]
        assert command_line(again) == 0
        assert here.rows(f"{out}-again/metrics.jsonl")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
        assert here.rows(f"{out}-again/eval.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_a_reward_model_and_ppo_on_a_quantised_base(here, capsys):
    rm = ["train-rm", "--model", "sft", "--data", "prefs.jsonl", *SHORT, "--lr", "3e-3", "--max-steps", "4"]
    assert command_line([*rm, "--quantize", "4bit", "--save-dtype", "bfloat16", "--out", "rm-4bit"]) == 0
    model, _, codec = load_classifier("rm-4bit", Place(quantize="4bit", apart=True))
    assert quantized.is_quantized(model)
    from dpoctl.data.encode import Limits, encode_pairs
    from dpoctl.data.readers import load_rows
    from dpoctl.training import pairs

    data = encode_pairs(load_rows("prefs.jsonl", "preferences"), codec, Limits(96, 16))
    rewards = rewards_of(model, pairs.sequences(data), tokens_per_batch=4096)
    # the shift was measured on the quantised model that was trained
    assert rewards.mean().item() == pytest.approx(model.config.reward_shift, abs=2e-2) and rewards.std() > 0.01
    ppo = (
        "train-ppo --model sft --prompts train.jsonl --reward rm-4bit --quantize 4bit --lr 3e-3 --ppo-epochs 1".split()
    )
    ppo += [*SHORT, *"--batch-size 8 --minibatch-size 4 --max-steps 2 --max-new-tokens 6 --out ppo-4bit".split()]
    capsys.readouterr()
    assert command_line(ppo) == 0
    assert "rm-4bit: its adapters share the policy's base" in " ".join(capsys.readouterr().err.split())
    kl = [row["objective/kl"] for row in here.rows("ppo-4bit/metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-4) and abs(kl[1]) > 1e-4


@pytest.fixture
def prequantized(here):
    """`sft` as a checkpoint that bitsandbytes quantised, in the directory sft-bnb."""
    folder = here.folder / "sft-bnb"
    if not folder.exists():
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained("sft", dtype=torch.float32, quantization_config=how).save_pretrained(
            folder
        )
        load_policy("sft").tokenizer.save_pretrained(folder)
        shutil.copy("sft/generation_config.json", folder)
    return "sft-bnb"


def test_a_quantised_checkpoint_is_sampled_and_gets_adapters(prequantized, here, capsys):
    model = load_policy(prequantized).model
    assert quantized.is_quantized(model) and has_plain_head(model)
    sample = ["sample", "--model", prequantized, "--prompts", "test.jsonl", "--max-new-tokens", "4"]
    assert command_line([*sample, "--out", "of-bnb.jsonl"]) == 0

    full = ["train-dpo", "--model", prequantized, "--data", "prefs.jsonl", *SHORT[:-2], "--max-steps", "2"]
    capsys.readouterr()
    assert command_line([*full, "--out", "refused"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "sft-bnb is quantised (bitsandbytes): its weights cannot be trained" in said and "--lora 16" in said
    assert command_line([*full, "--lora", "4", "--quantize", "8bit", "--out", "refused"]) == 2
    assert "is quantised already (bitsandbytes)" in " ".join(capsys.readouterr().err.split())

    assert command_line([*full, "--lora", "4", "--lr", "1e-3", "--log-every", "1", "--out", "dpo-on-bnb"]) == 0
    assert here.rows("dpo-on-bnb/metrics.jsonl")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    # the adapter stays apart from a base that cannot be changed: this is the policy that was trained
    found = load_policy("dpo-on-bnb").model
    theirs = peft.PeftModel.from_pretrained(load_policy(prequantized).model, "dpo-on-bnb").eval().get_base_model()
    with torch.no_grad():
        ours = summed_logps(found, SEQUENCES)
        assert torch.allclose(ours, summed_logps(theirs, SEQUENCES), atol=1e-5)
    assert not any(p.requires_grad for p in found.parameters())
    sample[2] = "dpo-on-bnb"
    assert command_line([*sample, "--out", "of-dpo-on-bnb.jsonl"]) == 0

    capsys.readouterr()
    assert command_line(["merge", "dpo-on-bnb", "--out", "never"]) == 2
    assert "is quantised, and nothing can be merged into it" in " ".join(capsys.readouterr().err.split())
    assert command_line(["merge", "dpo-on-bnb", "--base", "sft", "--out", "dpo-on-bnb-merged"]) == 0
    assert "that sft has them is not checked" in " ".join(capsys.readouterr().err.split())
    merged = logps(AutoModelForCausalLM.from_pretrained("dpo-on-bnb-merged", dtype=torch.float32))
    assert torch.allclose(merged, ours, atol=2.0) and not torch.allclose(merged, ours, atol=1e-5)


def test_methods_without_gradients_are_refused(prequantized, here, capsys, monkeypatch):
    """As transformers says it of its quantisers, such as that of fp8."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setattr(Bnb4BitHfQuantizer, "is_trainable", False)
    args = ["train-dpo", "--model", prequantized, "--data", "prefs.jsonl", *SHORT, "--out", "refused"]
    capsys.readouterr()
    assert command_line(args) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--lora: sft-bnb is quantised by bitsandbytes, through which transformers computes no gradients" in said


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_bfloat16_on_a_quantised_base(here, bits):
    """Policy and reference are the same numbers in lower precision, too, and the frozen weights stay quantised."""
    args = ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", *SHORT, "--quantize", bits, "--dtype", "bfloat16"]
    args += ["--activation-checkpointing", "--lr", "1e-3", "--max-steps", "2", "--log-every", "1"]
    assert command_line([*args, "--out", f"dpo-bf16-{bits}"]) == 0
    rows = here.rows(f"dpo-bf16-{bits}/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-3) and rows[1]["loss"] != rows[0]["loss"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--quantize", "4bit"], "--quantize has no effect without --lora"),
        (["--quantize", "4bit", "--lora", "4", "--parallel", "fsdp"], "holds the whole model on every device"),
    ],
)
def test_options_that_do_not_go_with_it(here, capsys, flags, word):
    args = ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", *SHORT[:-2], *flags, "--out", "refused"]
    capsys.readouterr()
    assert command_line(args) == 2
    assert word in " ".join(capsys.readouterr().err.split())


def test_without_bitsandbytes_it_is_one_clear_message(here, capsys, monkeypatch):
    from transformers import utils

    monkeypatch.setattr(utils, "is_bitsandbytes_available", lambda: False)
    args = ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", *SHORT, "--quantize", "4bit", "--out", "refused"]
    capsys.readouterr()
    assert command_line(args) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "needs bitsandbytes" in said and "pip install 'dpoctl[lora,quantize]'" in said
    assert not (here.folder / "refused/manifest.json").exists()


def test_a_device_that_bitsandbytes_does_not_know_is_refused(here, monkeypatch):
    import bitsandbytes

    from dpoctl.errors import InputError

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(InputError, match="does not support the device cpu"):
        load_policy("sft", Place(quantize="4bit"))


def test_a_checkpoint_of_a_method_that_is_not_installed(here, capsys):
    shutil.copytree("sft", "sft-gptq", dirs_exist_ok=True)
    (here.folder / "sft-gptq/manifest.json").unlink()
    config = json.loads((here.folder / "sft-gptq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (here.folder / "sft-gptq/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert command_line(["sample", "--model", "sft-gptq", "--prompts", "test.jsonl", "--out", "refused.jsonl"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "its weights are quantised (gptq)" in said and "Traceback" not in said


def test_a_quantised_checkpoint_is_not_sharded(here):
    shutil.copytree("sft", "gptq-shape")
    config = json.loads((here.folder / "gptq-shape/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (here.folder / "gptq-shape/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"weights are quantised \(gptq\), which --parallel fsdp cannot shard"):
        load_policy("gptq-shape", Place("meta"))


@pytest.mark.slow
def test_the_plan_counts_quantised_weights(here, capsys):
    args = ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", *SHORT, "--dry-run", "--out", "planned"]
    sizes = {}
    for bits in (None, "8bit", "4bit"):
        capsys.readouterr()
        assert command_line([*args, *(["--quantize", bits] if bits else [])]) == 0
        shown = dict(
            line.split(maxsplit=1)
            for line in capsys.readouterr().out.replace("memory: ", "").splitlines()
            if len(line.split()) > 1
        )
        sizes[bits] = float(shown["weights"].split()[0])
    held = {}
    for bits in sizes:
        model = load_policy("sft", Place(quantize=bits)).model
        held[bits] = sum(p.numel() * p.element_size() for p in model.parameters())
    for bits in ("8bit", "4bit"):
        assert (sizes[None] - sizes[bits]) * 1e6 == pytest.approx(held[None] - held[bits], rel=0.1)
