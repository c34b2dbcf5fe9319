"""--deterministic: what it sets before a GPU starts, and what is said of an operation that has no such algorithm."""

import os

import pytest
import torch

from dpoctl.cli import app, dispatch
from dpoctl.inference import token_sampling
from dpoctl.runtime import determinism, devices


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored at the end, whatever is set in between
    yield
    determinism.ask(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_the_workspace_of_cublas_is_fixed_and_a_users_choice_is_kept(monkeypatch):
    determinism.ask(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    determinism.ask(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_gpu_gets_deterministic_algorithms_and_a_cpu_stays_as_it_is():
    """And the next command of the process gets what it asks for."""
    determinism.ask(True)
    devices.pick_device("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    determinism.apply("cuda")
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # it would write all memory twice
    determinism.ask(False)
    determinism.apply("cuda")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_command_asks_for_it_and_without_the_option_does_not(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(dispatch.determinism, "ask", asked.append)
    for option in ([], ["--deterministic"]):
        app.run(["sample", "--model", "none", "--prompts", "none", "--out", str(tmp_path / "o.jsonl"), *option])
    assert asked == [False, True]


def test_an_operation_without_a_deterministic_algorithm_is_named(monkeypatch, capsys):
    """The error is torch's own: put_ has no deterministic way of writing twice to one place."""

    def compute(*args, **kwargs):
        torch.use_deterministic_algorithms(True)
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([2.0, 3.0]), accumulate=False)

    monkeypatch.setattr(dispatch, "_run", compute)
    assert app.run(["sample", "--model", "m", "--prompts", "p", "--out", "o.jsonl", "--deterministic"]) == 2
    said = capsys.readouterr().err
    assert "--deterministic: put_ has no deterministic algorithm on this device" in said and "hint: leave" in said
    assert determinism.missing(RuntimeError("CUDA error: an illegal memory access")) is None


def test_sums_of_integers_give_the_draws_of_sums_of_floats(monkeypatch):
    """What a GPU takes in place of running sums of floats, whose order may change: tokens of probability 0 stay out."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 700, generator=draw)
    logits[:, ::3] = -torch.inf
    u = torch.rand(400, generator=draw, dtype=torch.float64)
    for options in ({"top_k": 0, "top_p": 1.0}, {"top_k": 9, "top_p": 1.0}, {"top_k": 0, "top_p": 0.9}):
        by_floats = token_sampling.sample_token(logits.clone(), u, temperature=1.0, **options)
        with monkeypatch.context() as patched:
            patched.setattr(token_sampling, "_running_sums", summed)
            by_integers = token_sampling.sample_token(logits.clone(), u, temperature=1.0, **options)
        assert torch.equal(by_integers, by_floats)
        assert not (by_integers % 3 == 0).any()
    exact = summed(torch.tensor([[0.25, 0.5, 0.0, 1e-3]], dtype=torch.float64))
    assert exact.diff().min() == 0.0 and torch.allclose(exact, torch.tensor([[0.25, 0.75, 0.75, 0.751]]).double())
    assert summed(torch.zeros(1, 3, dtype=torch.float64)).eq(0).all()


def summed(weights: torch.Tensor) -> torch.Tensor:
    return token_sampling._sums_of_integers(weights)
