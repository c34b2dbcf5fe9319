"""The load-balancing loss of mixtures of experts: that of the whole update, whatever its micro-batches and layout."""

import json

import pytest
import torch

from architectures import reference, zoo
from dpoctl.cli.app import run as command_line
from dpoctl.models import logprobs
from dpoctl.models.routing import RoutedTokens

TEXTS = [([5, 6, 7, 8, 9, 10], 3), ([5, 6, 7, 11], 3), ([12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], 9)]


def routed_loss(model, texts, counts, *, pack):
    model._dpoctl_can_pack = pack
    routed = RoutedTokens(counts, top_k=2)
    logprobs.summed_logps(model, texts, routed=routed)
    return routed


@pytest.mark.parametrize("pack", [False, True])
def test_it_is_the_loss_of_transformers_over_all_texts(pack):
    """A text that counts twice is in the batch twice; the packed prompt counts for both of its completions."""
    model = zoo.make_model("qwen3-moe")
    counts = [2.0, 1.0, 1.0]
    batch = [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[2]]
    expected = reference.balance_loss([(batch[0], batch[1]), (batch[2], batch[3])], 1.0)(model)
    logprobs.can_pack(model, 16)
    routed = routed_loss(model, TEXTS, counts, pack=pack)
    found = routed.loss(routed.totals())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    [ours] = torch.autograd.grad(found, model.model.layers[0].mlp.gate.weight)
    [theirs] = torch.autograd.grad(expected, model.model.layers[0].mlp.gate.weight)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_micro_batches_add_up_to_the_loss_of_their_union():
    model = zoo.make_model("mixtral")
    logprobs.can_pack(model, 16)
    whole = routed_loss(model, TEXTS, [1.0] * 3, pack=True)
    parts = [routed_loss(model, TEXTS[:1], [1.0], pack=True), routed_loss(model, TEXTS[1:], [1.0] * 2, pack=True)]
    totals = parts[0].totals() + parts[1].totals()
    assert torch.allclose(totals, whole.totals())
    shares = sum(part.loss(totals) for part in parts)
    assert shares.item() == pytest.approx(whole.loss(whole.totals()).item(), rel=1e-6)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    zoo.save(tmp_path / "asks", "mixtral")
    zoo.save(tmp_path / "silent", "mixtral", output_router_logits=False)
    zoo.save(tmp_path / "dense", "llama")
    words = ["stone river bread", "winter market candle bridge", "window", "letter engine garden silver morning"]
    pairs = [{"prompt": f"{words[i]}:", "chosen": f" {words[i - 1]}", "rejected": f" {words[i - 2]}"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(place, out: str) -> list[dict]:
    return [json.loads(line) for line in (place / out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["train-dpo", "sft --field chosen", "train-rm"])
def test_it_is_part_of_the_loss_where_the_configuration_or_the_option_asks(place, capsys, stage):
    train = f"{stage} --data pairs.jsonl --batch-size 4 --max-steps 2 --warmup-steps 0 --lr 1e-3 --optimizer adamw"
    train += " --log-every 1"
    assert command_line(f"{train} --model asks --out on".split()) == 0
    assert "load-balancing loss is part of the loss, with coefficient 0.5" in " ".join(capsys.readouterr().err.split())
    assert command_line(f"{train} --model asks --router-aux-loss-coef 0 --out off".split()) == 0
    on, off = metrics(place, "on"), metrics(place, "off")
    assert on[0]["loss"] == pytest.approx(off[0]["loss"] + 0.5 * on[0]["router_aux_loss"], rel=1e-5)
    assert on[0]["router_aux_loss"] > 1 and "router_aux_loss" not in off[0]

    # a micro-batch for each text: the same numbers
    assert command_line(f"{train} --model asks --tokens-per-batch 1 --out small".split()) == 0
    for a, b in zip(on, metrics(place, "small"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )
        assert b["router_aux_loss"] == pytest.approx(a["router_aux_loss"], rel=1e-5)

    capsys.readouterr()
    assert command_line(f"{train} --model silent --out silent-off".split()) == 0
    assert "without the load-balancing loss (--router-aux-loss-coef 0.5 adds it)" in " ".join(
        capsys.readouterr().err.split()
    )
    assert command_line(f"{train} --model silent --router-aux-loss-coef 0.5 --out silent-on".split()) == 0
    assert metrics(place, "silent-on") == on
    assert json.loads((place / "on/config.json").read_text())["output_router_logits"] is True


def test_the_option_is_refused_for_a_dense_model(place, capsys):
    args = "train-dpo --data pairs.jsonl --model dense --router-aux-loss-coef 0.1 --out no"
    assert command_line(args.split()) == 2
    assert "--router-aux-loss-coef has no effect" in " ".join(capsys.readouterr().err.split())
