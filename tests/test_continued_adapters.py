"""Training that continues an adapter, and adapters by DoRA and rsLoRA: what is saved is the policy that was trained."""

import json

import pytest
import torch

from dpoctl.cli.app import run as command_line
from dpoctl.models.load import load_classifier, load_policy
from dpoctl.models.logprobs import summed_logps
from dpoctl.models.rewards import rewards_of
from helpers.log_probs import one_by_one

peft = pytest.importorskip("peft")
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

SHORT = "--max-length 96 --max-prompt-length 16 --warmup-steps 0 --batch-size 16 --epochs 9".split()
SEQUENCES = [([5, 6, 7, 8, 9, 10], 2), ([5, 6, 20, 21], 2), ([30, 31, 32, 33, 34], 3)]


def plain(base: str, adapter: str | None, cls=AutoModelForCausalLM, **options):
    """A model as transformers and peft load it."""
    model = cls.from_pretrained(base, dtype=torch.float32, **options).eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def logps(model) -> torch.Tensor:
    """Summed log-probs of SEQUENCES, each forwarded alone."""
    return one_by_one(model, SEQUENCES)


def tune(out: str, *flags: str, steps: int = 4, model: str = "lm") -> None:
    args = ["sft", "--model", model, "--data", "sft.jsonl", *SHORT, "--lr", "3e-3", "--max-steps", str(steps)]
    assert command_line([*args, *flags, "--out", out]) == 0


def prefer(out: str, *flags: str, model: str, steps: int = 4) -> list[str]:
    args = ["train-dpo", "--model", model, "--data", "prefs.jsonl", *SHORT, "--lr", "5e-4", "--max-steps", str(steps)]
    return [*args, "--log-every", "1", *flags, "--out", out]


@pytest.mark.parametrize("kind", [[], ["--use-dora"], ["--use-rslora"], ["--use-dora", "--use-rslora"]], ids=str)
def test_dora_and_rslora_load_as_peft_loads_them(here, kind):
    name = "kind" + "".join(kind)
    tune(name, "--lora", "4", "--lora-alpha", "8", *kind)
    config = json.loads((here.folder / name / "adapter_config.json").read_text())
    assert config["use_dora"] == ("--use-dora" in kind) and config["use_rslora"] == ("--use-rslora" in kind)
    theirs = logps(plain("lm", name))
    with torch.no_grad():
        ours = summed_logps(load_policy(name).model, SEQUENCES)
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(theirs, logps(plain("lm", None)), atol=1e-2)
    assert command_line(["merge", name, "--out", f"merged-{name}"]) == 0
    assert torch.allclose(logps(plain(f"merged-{name}", None)), theirs, atol=1e-4)
    if kind == ["--use-rslora"]:  # alpha / sqrt(4) is twice alpha / 4
        from peft.tuners.lora import LoraLayer

        layers = [m for m in plain("lm", name).modules() if isinstance(m, LoraLayer)]
        assert {layer.scaling["default"] for layer in layers} == {4.0}


@pytest.mark.parametrize("kind", [[], ["--use-dora"]], ids=["lora", "dora"])
def test_dpo_continues_the_adapter_of_sft(here, kind):
    """The reference is the SFT model, base and adapter; the result is an adapter of the same base."""
    start, out = "sft-adapter" + "".join(kind), "dpo-adapter" + "".join(kind)
    tune(start, "--lora", "4", *kind)
    points = "--eval-prompts test.jsonl --eval-limit 4 --scorer classifier --max-new-tokens 6 --eval-every 4".split()
    args = prefer(out, "--lora", "4", *points, model=start)
    assert command_line(args) == 0
    rows = here.rows(f"{out}/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and min(row["loss"] for row in rows) < 0.69
    points = here.rows(f"{out}/eval.jsonl")
    # the reference is the start, not the base: the KL is 0 before the first update
    assert points[0]["kl"] == pytest.approx(0, abs=1e-4) and points[-1]["kl_exact"] > 1e-5

    before, after = plain("lm", start), plain("lm", out)  # plain peft on the plain base
    assert not torch.allclose(logps(before), logps(after), atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(summed_logps(load_policy(out).model, SEQUENCES), logps(after), atol=1e-4)
    # the policy that was trained: the last checkpoint's weights are the saved ones
    config = json.loads((here.folder / out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(here.folder / "lm") and config["r"] == 4
    for command in (
        ["sample", "--model", out, "--prompts", "test.jsonl", "--max-new-tokens", "4", "--out", f"{out}.jsonl"],
        ["merge", out, "--out", f"{out}-merged"],
        prefer(f"{out}-again", "--lora", "4", model=out, steps=1),  # and goes on again
    ):
        assert command_line(command) == 0
    assert torch.allclose(logps(plain(f"{out}-merged", None)), logps(after), atol=1e-4)


def test_the_first_update_is_that_of_peft_on_the_merged_reference(here):
    """Losses and gradient norm of an independent DPO on the same pairs: float64, transformers and peft, one by one."""
    tune("once-start", "--lora", "4")
    assert command_line(prefer("once", "--lora", "4", "--batch-size", "64", model="once-start", steps=1)) == 0
    row = here.rows("once/metrics.jsonl")[0]
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)
    wrapper = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("lm", dtype=torch.float64), "once-start", is_trainable=True
    ).eval()
    from dpoctl.data.encode import Limits, encode_pairs
    from dpoctl.data.readers import load_rows
    from dpoctl.models.tokenizers import load_codec
    from dpoctl.training import pairs

    data = encode_pairs(load_rows("prefs.jsonl", "preferences"), load_codec("once-start"), Limits(96, 16))
    stream = pairs.pair_stream(data, Options())
    sequences, total = pairs.sequences(data), torch.zeros((), dtype=torch.float64)
    batch = stream.batch(0)
    for i in batch:  # at policy = reference the gradient is -beta/2 (grad log pi(w) - grad log pi(l))
        for index, sign in zip(data.pairs[i], (-1, 1), strict=True):
            ids, start = sequences[index]
            scores = wrapper(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = total + sign * 0.05 * sum(scores[t - 1, ids[t]] for t in range(start, len(ids))) / len(batch)
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in wrapper.parameters() if p.grad is not None])
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


class Options:
    """What pair_stream reads."""

    seed, batch_size, epochs, max_steps = 0, 64, 9, 1


def test_a_reward_model_from_an_adapter(here):
    tune("rm-start", "--lora", "4")
    args = ["train-rm", "--model", "rm-start", "--data", "prefs.jsonl", *SHORT, "--lr", "3e-3", "--lora", "4"]
    assert command_line([*args, "--max-steps", "4", "--out", "rm-of-adapter"]) == 0
    ours, _, codec = load_classifier("rm-of-adapter")
    ids = [5, 6, 7, 8, 9, 10]
    found = rewards_of(ours, [(ids, 2)], tokens_per_batch=64)
    model = plain(
        "lm",
        "rm-of-adapter",
        AutoModelForSequenceClassification,
        num_labels=1,
        pad_token_id=codec.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids])).logits[0], found, atol=1e-4)
    # its trunk started from the adapter, not from the base: one update is not far from the start
    again = ["train-rm", "--model", "rm-of-adapter", "--data", "prefs.jsonl", *SHORT, "--lr", "1e-9", "--lora", "4"]
    assert command_line([*again, "--max-steps", "1", "--select", "last", "--out", "rm-again"]) == 0
    assert torch.allclose(
        rewards_of(load_classifier("rm-again").model, [(ids, 2)], tokens_per_batch=64), found, atol=1e-3
    )
    assert command_line(["merge", "rm-of-adapter", "--out", "rm-of-adapter-merged"]) == 0
    merged = load_classifier("rm-of-adapter-merged").model
    assert torch.allclose(rewards_of(merged, [(ids, 2)], tokens_per_batch=64), found, atol=1e-4)


def test_ppo_from_an_adapter_is_penalised_towards_it(here):
    tune("ppo-start", "--lora", "4")
    args = "train-ppo --model ppo-start --prompts train.jsonl --reward classifier --lora 4 --lr 3e-3".split()
    args += "--ppo-epochs 1 --batch-size 8 --minibatch-size 4 --max-steps 2 --max-new-tokens 6 --warmup-steps 0".split()
    assert command_line([*args, "--max-length", "96", "--max-prompt-length", "16", "--out", "ppo-of-adapter"]) == 0
    kl = [row["objective/kl"] for row in here.rows("ppo-of-adapter/metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-4) and abs(kl[1]) > 1e-4
    assert not torch.allclose(logps(plain("lm", "ppo-of-adapter")), logps(plain("lm", "ppo-start")), atol=1e-4)


def test_a_resumed_run_keeps_its_reference(here):
    tune("kept", "--lora", "4")
    points = "--eval-prompts test.jsonl --eval-limit 4 --scorer classifier --max-new-tokens 6 --eval-every 2".split()
    flags = ["--lora", "4", *points, "--save-every", "2"]
    assert command_line(prefer("whole", *flags, model="kept")) == 0
    from dpoctl.training.loop import Trainer

    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        original = Trainer.save

        def save_and_stop(self, step):
            original(self, step)
            raise Stop

        patch.setattr(Trainer, "save", save_and_stop)
        with pytest.raises(Stop):
            command_line(prefer("broken", *flags, model="kept"))
    assert command_line(prefer("broken", *flags, model="kept")) == 0
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert (here.folder / "whole" / name).read_bytes() == (here.folder / "broken" / name).read_bytes()
    ours, theirs = (
        [{k: v for k, v in row.items() if k != "model"} for row in here.rows(f"{run}/eval.jsonl")]
        for run in ("whole", "broken")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--lora", "8"], "--lora: refusing is an adapter itself, which training continues, and its value is 4"),
        (["--lora", "4", "--lora-alpha", "3"], "--lora-alpha: refusing"),
        (["--lora", "4", "--lora-targets", "c_attn"], "--lora-targets: refusing"),
        (["--lora", "4", "--use-dora"], "--use-dora: refusing"),
        (["--lora", "4", "--use-rslora"], "--use-rslora: refusing"),
        (["--use-dora"], "--use-dora has no effect without --lora"),
    ],
)
def test_options_that_contradict_the_adapter_are_refused(here, capsys, flags, word):
    if not (here.folder / "refusing").exists():
        tune("refusing", "--lora", "4", steps=1)
    capsys.readouterr()
    assert command_line(prefer("refused", *flags, model="refusing")) == 2
    assert word in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bias": "all"}, "trains biases"),
        ({"target_modules": ["c_attn", "wte"]}, "adapts embeddings"),
        ({"init_lora_weights": "pissa"}, "changes its base"),
    ],
)
def test_adapters_that_cannot_be_continued_are_refused(here, capsys, options, word):
    model = AutoModelForCausalLM.from_pretrained("lm")
    config = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"} | options
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**config))
    wrapper.peft_config["default"].base_model_name_or_path = "lm"
    wrapper.save_pretrained("foreign")
    load_policy("lm").tokenizer.save_pretrained("foreign")
    capsys.readouterr()
    assert command_line(prefer("refused", "--lora", "4", model="foreign")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert word in said and "merge it into its base first" in said
