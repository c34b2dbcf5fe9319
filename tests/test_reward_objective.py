"""The reward model's loss and calibration: worked arithmetic, and a known reward recovered from exact labels."""

import itertools
import math

import pytest
import torch

from dpoctl.objectives.reward import bradley_terry, calibration, centring


def test_bradley_terry_by_hand_and_its_gradient():
    chosen, rejected = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([0.0, 0.0])
    losses = bradley_terry(chosen, rejected, torch.tensor([0.0, 1.0]))
    assert torch.allclose(losses, torch.tensor([math.log(1 + math.exp(-1)), math.log(1 + math.e)]))
    losses.sum().backward()
    assert torch.allclose(chosen.grad, -torch.sigmoid(torch.tensor([-1.0, 1.0])))


def test_centring_by_hand_and_its_gradient():
    """(1 + 2)^2 = 9 and (0.5 - 2.5)^2 = 4; both rewards of a pair have the gradient 2 (r_w + r_l)."""
    chosen = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([2.0, -2.5], dtype=torch.float64, requires_grad=True)
    losses = centring(chosen, rejected)
    assert losses.tolist() == [9.0, 4.0]
    losses.sum().backward()
    assert chosen.grad.tolist() == rejected.grad.tolist() == [6.0, -4.0]


def test_centring_fixes_the_constant_that_bradley_terry_leaves_free():
    """From exact labels it moves no difference of two texts' rewards whose sum it can bring to 0."""
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (5.0, 4.0))
    optimizer = torch.optim.LBFGS([chosen, rejected], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = 0.75 * bradley_terry(chosen, rejected) + 0.25 * bradley_terry(rejected, chosen)
        loss = (loss + 0.01 * centring(chosen, rejected)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (chosen + rejected).item() == pytest.approx(0, abs=1e-4)
    assert (chosen - rejected).item() == pytest.approx(math.log(3), abs=1e-4)


def test_bradley_terry_recovers_a_known_reward_up_to_a_constant():
    """From labels in their exact proportions, over all ordered pairs of six texts."""
    truth = torch.tensor([0.0, 1.5, -0.7, 0.2, 2.0, -2.0], dtype=torch.float64)
    w, l = torch.tensor(list(itertools.permutations(range(6), 2))).unbind(1)  # noqa: E741
    proportion = torch.sigmoid(truth[w] - truth[l])
    reward = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([reward], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (proportion * bradley_terry(reward[w], reward[l])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = reward.detach() - reward.detach().mean()
    assert torch.allclose(found, truth - truth.mean(), atol=1e-5)


def test_calibration_by_hand():
    margins = torch.tensor(
        [0.0, math.log(3), -math.log(3), math.log(3), math.log(3)], dtype=torch.float64
    )  # confidence .5 and .75
    error, bins = calibration(margins)
    assert [(pytest.approx(c), r, n) for c, r, n in bins] == [(0.5, 0.5, 1), (0.75, 0.75, 4)]
    assert error == pytest.approx(0.0, abs=1e-12)
    assert calibration(torch.full((4,), -math.log(3), dtype=torch.float64))[0] == pytest.approx(0.75)
