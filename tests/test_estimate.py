"""The memory that --dry-run tells against what a run takes, and against arithmetic."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from architectures import zoo
from dpoctl.inference import memory
from dpoctl.inference.memory import Batch, Target
from dpoctl.models import ledger
from dpoctl.models.flops import model_flops, sizes
from dpoctl.models.load import load_policy, untrained
from dpoctl.models.logprobs import summed_logps
from dpoctl.runtime import devices, fsdp, hardware
from dpoctl.training.estimate import Pass, Update, gather, gathered_bytes, update_phase
from dpoctl.training.optimization import make_optimizer, state_bytes
from helpers import real_models

SEQUENCES = [(list(range(5, 45)), 5), (list(range(5, 35)), 5), (list(range(50, 99)), 3)]
CPU = Target(hardware.of_device(torch.device("cpu")), torch.float32, torch.device("cpu"))
H100 = Target(hardware.GPUS["h100"], torch.bfloat16)


def options(optimizer: str = "adamw"):
    return SimpleNamespace(optimizer=optimizer, lr=1e-3, weight_decay=0.0)


def a_pass(sequences, *, accumulates: bool) -> Pass:
    return Pass(lambda model: summed_logps(model, sequences).sum(), accumulates)


def of(folder, target=CPU, sequences=SEQUENCES, **settings) -> dict[str, int]:
    """The parts of an update of a policy."""
    update = Update(passes=[a_pass(sequences, accumulates=True)], options=options())
    update = replace(update, **settings)
    with ledger.planning(gpu=target.gpu) as counted:
        model = ledger.fake(lambda: untrained(str(folder), "policy"), gpu=target.gpu)
        if update.recompute:
            from dpoctl.models.blocks import recompute_activations

            recompute_activations(model)
        weights = fsdp.bytes_of(model)
        if update.sharded:
            gather(model, target.dtype)
        return update_phase(counted, model, weights, update, target).parts


def test_parts_by_arithmetic(prefs):
    folder = prefs.folder / "sft"
    parameters = sum(p.numel() for p in untrained(str(folder), "policy").parameters())
    found = of(folder)
    assert found["weights"] == found["gradients"] == 4 * parameters
    assert found["optimizer"] == 8 * parameters
    less = of(folder, recompute=True)
    assert less["activations"] < 0.8 * found["activations"]
    shared = of(folder, world=4, sharded=True)
    assert shared["optimizer"] == pytest.approx(found["optimizer"] / 4, rel=1e-3)
    alone = of(folder, passes=[a_pass(SEQUENCES, accumulates=False)])
    assert sum(alone.values()) <= sum(found.values())


@pytest.mark.parametrize("sizes_of_update", [(24,), (24, 2), (24, 16), (24, 24)])
def test_an_update_of_real_tensors_holds_what_is_planned(prefs, sizes_of_update):
    """A second micro-batch is computed beside the gradients of the first one, which was computed beside none."""
    folder = prefs.folder / "sft"
    texts = [[([5 + i, 7, *range(20, 45)], 1) for i in range(n)] for n in sizes_of_update]
    model = load_policy(str(folder)).model
    summed_logps(model, texts[0])  # probes the model first
    made = make_optimizer(options(), model)
    with ledger.Ledger() as counted:
        for _ in range(2):  # in the second one, weights and the optimizer's state are known to the ledger
            before = counted.restart()
            for sequences in texts:
                summed_logps(model, sequences).sum().backward()
            made.step()
            made.zero_grad(set_to_none=True)
    passes = [a_pass(sequences, accumulates=i > 0) for i, sequences in enumerate(texts)]
    planned = of(folder, passes=passes)
    beside = sum(planned.values()) - planned["weights"] - planned["optimizer"]
    assert beside == pytest.approx(counted.peak - before, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "adamw-8bit"])
def test_an_optimizers_state_has_the_bytes_that_are_planned(optimizer):
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(torch.nn.Linear(100, 300), torch.nn.Linear(300, 7))
    made = make_optimizer(options(optimizer), model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    made.step()
    tensors = [t for s in made.state.values() for n, t in s.items() if isinstance(t, torch.Tensor) and n != "step"]
    assert sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()) == state_bytes(
        optimizer, model.parameters()
    )


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_a_step_makes_no_copy_of_all_weights(optimizer):
    """What `foreach` would do, which torch takes on a GPU where nothing else is asked for."""
    with FakeTensorMode(), ledger.Ledger() as counted:
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(20)))
        made = make_optimizer(options(optimizer), model)
        assert not any(group["foreach"] for group in made.param_groups)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        made.step()
        before = counted.restart()
        made.step()
    assert counted.peak - before <= 3 * 64 * 64 * 4  # of one weight


def test_recomputed_blocks_keep_no_cast_copies_of_the_weights(tmp_path):
    """In bfloat16 autocast would keep 2 bytes a weight until the backward pass."""
    folder = real_models.write(tmp_path / "lm", "llama-1b")
    layers = {**real_models.CONFIGS["llama-1b"], "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(layers))
    found = of(folder, H100, recompute=True)
    blocks = sum(p.numel() for n, p in untrained_on_meta(folder).named_parameters() if ".layers." in n)
    kept = of(folder, H100, recompute=False)
    assert found["activations"] < 0.1 * 2 * blocks < 2 * blocks <= kept["activations"]
    context = devices.Compute(torch.device("cpu"), torch.bfloat16).autocast(cached=False)
    with context:
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def untrained_on_meta(folder):
    with torch.device("meta"):
        return untrained(str(folder), "policy")


def test_what_fsdp_gathers_by_arithmetic(tmp_path):
    """Tied, embedding and head stay with the root; untied, the embedding is a part like the blocks."""
    embedding = 128256 * 2048
    for tied in (True, False):
        folder = real_models.write(tmp_path / f"lm-{tied}", "llama-1b")
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(config))
        model = untrained_on_meta(folder)
        block = sum(p.numel() for p in model.model.layers[0].parameters())
        norm = model.model.norm.weight.numel()
        parts = 2 * block if tied else block + embedding  # the embedding is larger than a block
        alone = gathered_bytes(model, torch.bfloat16, learning=False)
        assert alone == 2 * (embedding + norm + parts)
        sums = 4 * (embedding + norm)
        assert gathered_bytes(model, torch.bfloat16) == 2 * alone + sums


@pytest.mark.slow
def test_a_gpus_head_has_wide_tiles(tmp_path):
    """16,384 columns for a row: bfloat16 logits, float32 logits and softmax, its cast."""
    folder = real_models.write(tmp_path / "lm", "smollm2-135m")
    text = [([7] * 2000, 10)]
    narrow, wide = (of(folder, replace(H100, hardware=h), text) for h in (CPU.hardware, H100.hardware))
    assert wide["temporary"] - narrow["temporary"] > 4 * 1990 * (16384 - 1024)


def test_frozen_weights_are_held_in_the_compute_dtype(tmp_path):
    folder = real_models.write(tmp_path / "lm", "llama-1b")
    with ledger.planning(gpu=True) as counted:
        held = memory.open_frozen(counted, str(folder), "policy", None, H100)
    embedding = 128256 * 2048
    every = sum(p.numel() for p in untrained_on_meta(folder).parameters())
    # the tied embedding in float32 with a copy for the head, the linear layers in bfloat16, the norms in float32
    assert held.size == pytest.approx(6 * embedding + 2 * (every - embedding), rel=0.01)


def test_the_key_cache_by_arithmetic(tmp_path):
    folder = real_models.write(tmp_path / "lm", "smollm2-135m")
    with ledger.planning(gpu=False) as counted:
        held = memory.open_frozen(counted, str(folder), "policy", None, CPU)
        cache = memory.generate(held.model, Batch(4, 8, 20, 12))
    assert cache == 30 * 2 * 8 * 3 * 64 * (20 + 12) * 4  # layers, keys and values, rows, heads, width, positions, bytes


def test_flops_are_those_that_torch_counts(prefs):
    """torch counts attention over whole squares, so that it is compared apart."""
    model = load_policy(str(prefs.folder / "sft")).model
    summed_logps(model, SEQUENCES)  # probes the model first
    with FlopCounterMode(display=False) as counter:
        summed_logps(model, SEQUENCES).sum().backward()
    products = products_in(counter)
    cost, (tokens, rows, pairs) = model_flops(model), sizes(SEQUENCES, model.config.hidden_size)
    assert tokens == 5 + 34 + 24 + 3 + 45 and rows == 35 + 25 + 46  # a prompt once, no last tokens
    assert tokens * (cost.layers + cost.layers_back) + rows * (cost.head + cost.head_back) == products
    config = model.config
    assert cost.pair == 4 * config.hidden_size * config.num_hidden_layers
    trunk, tails = 5, (34, 24)
    shared = trunk * 6 // 2 + sum(t * trunk + t * (t + 1) // 2 for t in tails)
    assert pairs == shared + 3 * 4 // 2 + 45 * 3 + 45 * 46 // 2


@pytest.mark.parametrize("name", ["sft", "llama"])
def test_flops_of_adapters_are_those_that_torch_counts(prefs, name):
    """A layer counts once, with its adapters; gradients of frozen weights are not computed."""
    peft = pytest.importorskip("peft")
    base = load_policy(str(prefs.folder / "sft")).model if name == "sft" else zoo.make_model(name)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=name == "sft")
    peft.get_peft_model(base, config)
    summed_logps(base, SEQUENCES)  # probes the model first
    counts = []
    with FlopCounterMode(display=False) as counter:
        loss = summed_logps(base, SEQUENCES).sum()
        counts.append(products_in(counter))
        loss.backward()
        counts.append(products_in(counter))
    cost, (tokens, rows, _) = model_flops(base), sizes(SEQUENCES, base.config.hidden_size)
    forward, both = counts
    assert tokens * cost.layers + rows * cost.head == forward
    # the gradient of the embedding, which is frozen, is not computed: a part of the first block
    first = 2 * tokens * 4 * base.config.hidden_size * base.config.hidden_size
    expected = tokens * cost.layers_back + rows * cost.head_back
    assert expected - first <= both - forward <= expected


def products_in(counter) -> int:
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(n for op, n in counts.items() if "attention" not in op and "bmm" not in op)


def test_devices_by_name():
    assert hardware.of_cuda_name("NVIDIA H100 80GB HBM3") is hardware.GPUS["h100"]
    assert hardware.of_cuda_name("NVIDIA A100-SXM4-40GB") is hardware.GPUS["a100-40gb"]
    assert hardware.of_cuda_name("NVIDIA A100 80GB PCIe") is hardware.GPUS["a100-80gb"]
    assert hardware.of_cuda_name("NVIDIA GeForce RTX 4090") is hardware.GPUS["4090"]
    assert hardware.of_cuda_name("Another card") is None
    assert hardware.named("48").memory == 48e9 and hardware.named("48GB").bfloat16
    assert hardware.named("H100") is hardware.GPUS["h100"] and not hardware.named("t4").bfloat16
    assert hardware.named("quantum") is None and hardware.named("-4") is None and hardware.named("nan") is None


def test_a_devices_peak_is_measured_where_it_is_not_known():
    rate = hardware.peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
    assert hardware.peak_flops(torch.device("cpu"), torch.float32) == rate  # once


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width", "vocabulary"), [(4, 256, 8192), (6, 384, 50257), (12, 768, 50257)])
def test_within_15_percent_of_the_measured_peak(tmp_path, layers, width, vocabulary):
    """train-dpo on GPT-2 shapes of 5, 30 and 124 million parameters with random weights."""
    told, measured = peaks(tmp_path, layers, width, vocabulary)
    print(f"{layers} layers of {width}: told {told} GB, measured {measured:.2f} GB")
    assert told == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width", "vocabulary"), [(4, 256, 8192), (6, 384, 50257)])
def test_ilql_within_20_percent_of_the_measured_peak(tmp_path, layers, width, vocabulary):
    """Q heads over the vocabulary and their targets: 154 million weights beside the 30 million of the larger model."""
    told, measured = peaks(tmp_path, layers, width, vocabulary, "train-ilql --rows preferences")
    print(f"{layers} layers of {width}: told {told} GB, measured {measured:.2f} GB")
    assert told == pytest.approx(measured, rel=0.2)


def peaks(
    folder, layers: int, width: int, vocabulary: int, command: str = "train-dpo --cache-dir cache"
) -> tuple[float, float]:
    """(planned, measured) peak of a device in GB."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=512,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "lm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder / "lm"
    )
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(n))

    rows = [{"prompt": text(150), "chosen": " " + text(40), "rejected": " " + text(50)} for _ in range(32)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = (
        f"{command} --model lm --data prefs.jsonl --batch-size 16 --max-steps 2 --epochs 9 "
        "--tokens-per-batch 2048 --warmup-steps 0 --out run -q"
    ).split()

    def run(*more: str) -> str:
        command = [sys.executable, "-m", "dpoctl", *args, *more]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

    told = re.search(r"^memory of a device +([\d.]+) ([MG])B", run("--dry-run"), re.MULTILINE)
    assert told is not None
    run()
    measured = json.loads((folder / "run/manifest.json").read_text())["cost"]["peak_memory_bytes"] / 1e9
    return float(told[1]) / (1000 if told[2] == "M" else 1), measured
