"""Metrics stay on their device until they are read, with the numbers of sums that are read at once."""

import torch

from dpoctl.training import metrics
from dpoctl.training.metrics import Meter


def test_sums_of_tensors_are_those_of_floats_in_the_same_order():
    """float64 sums depend on their order: equal to the last bit."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=draw) * torch.logspace(-6, 6, 50)
    late, early = Meter(), Meter()
    for value in values:
        late.add_all({"mean": (value.double(), 2.0), "low": (value, min), "high": (value, max)})
        early.add_all({"mean": (float(value), 2.0), "low": (float(value), min), "high": (float(value), max)})
    assert late.state == early.state
    assert late.take() == early.take()


def test_everything_that_is_pending_is_read_at_once(monkeypatch):
    reads = []
    read = metrics.read
    monkeypatch.setattr(metrics, "read", lambda values: reads.append(len(values)) or read(values))
    meter = Meter()
    for n in range(4):
        meter.add_all({"loss": (torch.tensor(float(n)), 1.0), "tokens": (3.0, 1.0)})
    assert reads == []
    assert meter.settle(torch.tensor(7.0), torch.tensor(0.5)) == [7.0, 0.5]
    assert reads == [6]
    assert meter.take() == {"loss": 1.5, "tokens": 3.0}


def test_a_restored_meter_forgets_what_was_pending():
    meter = Meter()
    meter.add("loss", torch.tensor(5.0), 1.0)
    meter.restore({"sums": {"loss": 1.0}, "weights": {"loss": 1.0}})
    assert meter.take() == {"loss": 1.0}
