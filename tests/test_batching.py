"""Which rows share an update: exact batches, every item once an epoch, a pure function of seed and epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpoctl.data.batching import Stream, pack, permutation, share, shuffled, shuffled_groups

sizes = st.integers(1, 60)


def test_an_order_is_a_function_of_seed_and_epoch():
    assert (permutation(3, 1, 50) == permutation(3, 1, 50)).all()
    assert not (permutation(3, 1, 50) == permutation(3, 2, 50)).all()
    assert not (permutation(3, 1, 50) == permutation(4, 1, 50)).all()


@given(n=sizes, batch=sizes, epochs=st.sampled_from([0.3, 1.0, 2.0, 2.5]))
def test_batches_are_exact_and_an_epoch_has_every_row_once(n, batch, epochs):
    stream = Stream(n, batch, epochs, None, shuffled(0, n))
    seen = [i for step in range(stream.steps) for i in stream.batch(step)]
    assert len(seen) == max(1, int(np.ceil(n * epochs - 1e-9)))
    assert all(len(stream.batch(step)) == batch for step in range(stream.steps - 1))
    for start in range(0, len(seen) - n + 1, n):
        assert sorted(seen[start : start + n]) == list(range(n))
    assert stream.epoch(stream.steps) == pytest.approx(len(seen) / n)


def test_max_steps_bounds_the_run_and_never_lengthens_it():
    assert Stream(100, 10, 1.0, 3, shuffled(0, 100)).steps == 3
    assert Stream(100, 10, 1.0, 30, shuffled(0, 100)).steps == 10


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(0, 5))
def test_groups_stay_together_in_their_order(labels, seed):
    groups = [sorted(set(labels)).index(label) for label in labels]
    order = list(shuffled_groups(seed, groups)(0))
    assert sorted(order) == list(range(len(groups)))
    runs = [groups[i] for n, i in enumerate(order) if n == 0 or groups[order[n - 1]] != groups[i]]
    assert len(runs) == len(set(groups))
    for a, b in zip(order, order[1:], strict=False):
        assert a < b or groups[a] != groups[b]


@given(st.lists(sizes, min_size=1, max_size=30), st.integers(1, 5))
def test_ranks_share_a_batch_without_loss(costs, world):
    parts = [share(list(enumerate(costs)), lambda u: u[1], rank, world) for rank in range(world)]
    assert sorted(u for part in parts for u in part) == list(enumerate(costs))


@given(st.lists(st.tuples(st.integers(1, 5), sizes), min_size=1, max_size=30), st.integers(1, 300))
def test_a_micro_batch_keeps_to_the_token_budget(units, tokens):
    batches = pack(units, lambda u: u[0] * u[1], lambda u: u[1], tokens)
    assert sorted(u for b in batches for u in b) == sorted(units)
    for b in batches:
        assert len(b) == 1 or sum(u[0] * u[1] for u in b) <= tokens
