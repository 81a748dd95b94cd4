"""The order of rows: permutations one after another, and a step that needs no history."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.data.order import Order
from layerwise.errors import BadInput

SIZES = {"rows": st.integers(1, 40), "batch": st.integers(1, 90), "seed": st.integers(-(2**31), 2**63)}


@settings(max_examples=60, deadline=None)
@given(**SIZES, epochs=st.integers(1, 4))
def test_batches_concatenate_to_epochs_and_every_epoch_is_a_permutation(rows, batch, seed, epochs):
    order = Order(rows, batch, seed)
    steps = -(-rows * epochs // batch)
    parts = [order.indices(step) for step in range(steps)]
    assert all(part.shape == (batch,) and part.dtype == torch.int64 for part in parts)
    walked = torch.cat(parts)[: rows * epochs].view(epochs, rows)
    assert torch.equal(walked.sort(dim=1).values, torch.arange(rows).expand(epochs, rows))


@settings(max_examples=60, deadline=None)
@given(**SIZES, asked=st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_a_step_does_not_depend_on_what_was_asked_before(rows, batch, seed, asked):
    used = Order(rows, batch, seed)
    for step in asked:
        assert torch.equal(used.indices(step), Order(rows, batch, seed).indices(step))


def test_a_caller_may_change_what_it_got():
    order = Order(8, 8, 0)
    first = order.indices(0).clone()
    order.indices(0).zero_()
    assert torch.equal(order.indices(0), first)


def test_a_batch_larger_than_the_rows_reaches_over_several_epochs():
    made = Order(3, 10, 5).indices(0)
    for epoch in range(3):
        assert sorted(made[3 * epoch : 3 * epoch + 3].tolist()) == [0, 1, 2]


def test_a_late_step_of_a_long_run_costs_no_more_than_its_epoch():
    order = Order(5, 2, 0)
    assert order.indices(10**9).shape == (2,) and len(order._kept) <= 2


def test_first_rows_are_even_over_seeds_and_over_epochs():
    over_seeds = torch.stack([Order(4, 4, seed).indices(0) for seed in range(2000)])
    order = Order(4, 4, 9)
    over_epochs = torch.stack([order.indices(step) for step in range(2000)])
    for drawn in (over_seeds, over_epochs):
        share = torch.stack([(drawn == row).float().mean(0) for row in range(4)])
        # Six standard deviations of a share of 1/4 among 2000.
        assert (share - 0.25).abs().max() < 6 * (0.25 * 0.75 / 2000) ** 0.5


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    Order(10, 3, 1).indices(7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("rows", "batch"), [(0, 1), (1, 0), (-1, 4)])
def test_nothing_to_order_is_refused(rows, batch):
    with pytest.raises(BadInput, match="at least one row and a batch of at least one"):
        Order(rows, batch, 0)
