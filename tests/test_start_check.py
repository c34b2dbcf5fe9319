"""A wrong mask is found in bfloat16 before the first update, within a bound from measured rounding."""

import pytest
import torch

from dpoctl.cli.app import run
from dpoctl.errors import NumericalError
from dpoctl.models import packed
from dpoctl.runtime.devices import Compute
from dpoctl.training import start_check
from helpers.tiny_models import tiny_model

BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16)


def texts(seed: int = 0) -> list[tuple[list[int], int]]:
    """Two completions of 20 and 14 tokens to each of three prompts of 12."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 61, (n,), generator=draw).tolist() for n in (12, 20, 14) * 3]
    return [(ids[3 * p] + ids[3 * p + b], 12) for p in range(3) for b in (1, 2)]


def measured(model, seed: int = 0) -> start_check.Rounding:
    return start_check.measure(model, texts(seed), BFLOAT16, lambda: None)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_right_masks_are_within_the_bound(name):
    """Several times over, and the bound is a small part of a log-prob of 4 nats a token."""
    for seed in range(3):
        found = measured(tiny_model(name), seed)
        assert found.packed < found.bound / 3 and found.bound < 0.5
        found.require_right_packing()


def siblings(tree, q, k, window):
    return (tree.group[q] == tree.group[k]) & (tree.position[k] <= tree.position[q])


def next_group(tree, q, k, window):
    """One token before a prompt's first is seen."""
    return right(tree, q, k, window) | ((k == q - tree.position[q] - 1) & (tree.branch[q] == 0))


def shifted_window(by: int):
    return lambda tree, q, k, window: right(tree, q, k, window if window is None else window + by)


right = packed.Tree.visible
WRONG = {
    "a branch sees its sibling": ("gpt2", siblings),
    "the window is off by two tokens": ("mistral", shifted_window(2)),
    "the window is short by one token": ("mistral", shifted_window(-1)),
    "there is no window": ("mistral", lambda tree, q, k, window: right(tree, q, k, None)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_mask_is_found(wrong, monkeypatch):
    """As a kernel may be wrong on a device while the model's code, which the probe looks at, is right."""
    name, visible = WRONG[wrong]
    model = tiny_model(name)
    measured(model)  # the probe, while masks are right
    monkeypatch.setattr(packed.Tree, "visible", visible)
    found = measured(model)
    assert found.packed > 1.5 * found.bound
    with pytest.raises(NumericalError, match="packed row differ from those of each text alone"):
        found.require_right_packing()


@pytest.mark.parametrize("place", [0, 1])
def test_numbers_that_are_none_on_one_rank_are_found(place, monkeypatch):
    """A maximum that compares by > forgets a NaN that is not the first."""
    nan, measures = float("nan"), [([1e-4, 1e-4], 6, 1e-3)]
    measures.insert(place, ([nan, nan], 6, nan))
    monkeypatch.setattr(start_check.collectives, "gather", lambda _: measures)
    with pytest.raises(NumericalError, match="packed row differ"):
        measured(tiny_model("gpt2")).require_right_packing()


def test_packing_is_as_it_was_after_the_check():
    model = tiny_model("gpt2")
    measured(model)
    assert not hasattr(model, "_dpoctl_can_pack")
    assert model.config._attn_implementation == packed.NAME


def test_a_run_in_bfloat16_starts_with_log_ratios_within_the_bound_and_a_wrong_reference_is_found(here, capsys):
    """The stored log-probs of a reference are off by a nat, as those of other weights or another mask would be."""
    command = "train-dpo --model sft --data prefs.jsonl --device cpu --dtype bfloat16 --max-steps 1 --max-length 96 "
    command += "--max-prompt-length 16 --batch-size 8 --cache-dir cache --warmup-steps 0 --out"
    assert run([*command.split(), "right"]) == 0
    assert "log-ratios before the first update: at most" in capsys.readouterr().err

    from dpoctl.training.reference_cache import ReferenceCache

    with pytest.MonkeyPatch.context() as patched:
        logps = ReferenceCache.logps
        for name, off in (("wrong", 1.0), ("none", float("nan"))):
            patched.setattr(ReferenceCache, "logps", lambda self, *args, off=off: logps(self, *args) + off)
            assert run([*command.split(), name]) == 3
            assert "policy and reference are the same model, yet a log-ratio" in capsys.readouterr().err
